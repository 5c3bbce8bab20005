// Where the sequences of a call lie in their tensors, and which keys a query may see, in all forms of attention.
#pragma once

#include "integers.h"
#include "kernels.h"

namespace fastattn::FASTATTN_ISA {

// Tokens q_begin … of the query tensors, tokens k_begin … of the key tensors. Query i stands at key i + diagonal. Padded
// keys lie around these, and are counted for what names a key by its place among all: dropout, and their gradients.
struct Sequence {
    int64_t q_begin, q_len, k_begin, k_len, diagonal;
    int64_t padded_before, padded_after;
};

inline Sequence sequence_of(const AttentionScore& args, int64_t b) {
    Sequence seq{0, args.max_q, 0, args.max_k, args.diagonal, 0, 0};
    if (args.cu_seqlens_q.present()) {
        const int32_t *q = args.cu_seqlens_q.as<int32_t>(), *k = args.cu_seqlens_k.as<int32_t>();
        seq.q_begin = q[b], seq.q_len = q[b + 1] - q[b];
        seq.k_begin = k[b], seq.k_len = k[b + 1] - k[b];
        seq.diagonal = seq.k_len - seq.q_len;
    } else if (args.cache_seqlens.present()) {
        seq.k_len = args.cache_seqlens.as<int32_t>()[b] + args.new_keys;
        seq.diagonal = seq.k_len - seq.q_len;
    }
    if (args.key_ranges) {
        const int64_t begin = smaller(args.key_ranges[2 * b], seq.k_len);
        const int64_t end = smaller(args.key_ranges[2 * b + 1], seq.k_len);
        seq.padded_before = begin, seq.padded_after = seq.k_len - end;
        seq.k_begin += begin, seq.k_len = end - begin, seq.diagonal -= begin;
    }
    return seq;
}

// The element (b, h, token, 0) of a (batch, heads, token, dim) tensor; also of (batch, heads, token).
inline int64_t offset_of(const Tensor& t, int64_t b, int64_t h, int64_t token) {
    return b * t.stride[0] + h * t.stride[1] + token * t.stride[2];
}

// The row of dropout's hash for query i.
inline uint64_t dropout_row(const AttentionScore& args, const Sequence& seq, int64_t total_q, int64_t b, int64_t h,
                            int64_t i) {
    return static_cast<uint64_t>(args.cu_seqlens_q.present() ? h * total_q + seq.q_begin + i
                                                             : (b * args.heads + h) * args.max_q + i);
}

struct KeyRange {
    int64_t begin, end;  // begin >= end: none
};

// The keys that queries first … last see between them by the window; each sees a range, and both its ends move with i.
inline KeyRange visible_keys(const AttentionScore& args, const Sequence& seq, int64_t first, int64_t last) {
    KeyRange range{0, seq.k_len};
    if (args.window_left >= 0) range.begin = larger(0, first + seq.diagonal - args.window_left);
    if (args.window_right >= 0) range.end = smaller(seq.k_len, last + seq.diagonal + args.window_right + 1);
    return range;
}

}  // namespace fastattn::FASTATTN_ISA
