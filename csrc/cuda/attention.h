// Attention's forward for Hopper GPUs. Plain pointers and a stream; bindings.cpp checks them.
#pragma once

#include <stdint.h>

#include "dtype.h"

namespace fastattn::cuda {

// A (batch, heads, seq, dim) tensor whose dim is contiguous; strides in elements.
struct AttentionOperand {
    const void* address;
    int64_t heads, seq, stride_batch, stride_head, stride_token;
};

struct AttentionForward {
    DType dtype;  // bfloat16 or float16
    int64_t batch, dim;
    AttentionOperand query, key, value;
    float scale;                                  // above 0
    int64_t window_left, window_right, diagonal;  // query i sees keys i + diagonal - left … + right; -1 for no limit
    int64_t section_bytes;                        // of keys and values that blocks at work at the same time read
    void* out;                                    // (batch, query.seq, query.heads, dim)
    float* lse;                                   // (batch, query.heads, query.seq)
    void* stream;
};
void attention_forward_hopper(const AttentionForward& arguments);

}  // namespace fastattn::cuda
