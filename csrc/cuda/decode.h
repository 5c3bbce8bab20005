// Attention of a few new queries to a key-value cache on a GPU. Plain pointers and a stream; bindings.cpp checks them.
#pragma once

#include <stdint.h>

#include "dtype.h"

namespace fastattn::cuda {

// The keys or the values: a cache, and the tokens that are appended to it.
struct CacheAddress {
    void* rows;  // (batch, kv_heads, capacity, dim), or a page in the place of batch
    int64_t stride_block, stride_head, stride_token;  // in elements, as all strides; dim is contiguous
    const void* added;                                // (batch, kv_heads, added, dim)
    int64_t stride_added_batch, stride_added_head, stride_added_token;
    int64_t dim;
};

// Angles (batch, added, dim) in any dtype, by which queries and appended keys are turned. dim is 0 where there are none.
struct AngleAddress {
    const void* values;
    DType dtype;
    int64_t stride_batch, stride_token;
};
struct Turn {
    AngleAddress cos, sin;
    int64_t dim;
    bool interleaved;
};

struct Decode {
    DType dtype;
    int64_t batch, heads, kv_heads, queries, added;
    int64_t capacity, pages, page_size;  // capacity: of a sequence; pages: there are, 0 without a table
    const void* query;                   // (batch, heads, queries, key.dim), key.dim contiguous
    int64_t stride_query_batch, stride_query_head, stride_query_token;
    CacheAddress key, value;
    Turn turn;                     // if any, there are as many queries as appended tokens
    const int32_t* cache_seqlens;  // (batch,)
    const int32_t* block_table;    // (batch, pages of a sequence), or null
    int64_t stride_table_batch;
    const float* slopes;  // (batch, heads), or null
    int64_t stride_slopes_batch;
    float scale, softcap;               // softcap: 0 for none
    int64_t window_left, window_right;  // -1 for none
    void* out;                          // (batch, queries, heads, value.dim)
    float* lse;                         // (batch, heads, queries)
    int64_t parts;                      // of the keys
    float *partial_out,
        *partial_lse;  // (parts, batch, queries, heads, value.dim) and without the last; null for one part
    void* stream;
};
void decode(const Decode& arguments);

// Into how many parts the keys go, and the rows (query, head) and the dim that one key head may have.
int64_t decode_parts(int64_t sequences, int64_t capacity, int64_t multiprocessors);
int64_t decode_most_rows();
int64_t decode_most_dim();

}  // namespace fastattn::cuda
