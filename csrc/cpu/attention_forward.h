// What the two ways that attention runs forward share. Both compute the same formula (attention_forward.cpp), for any
// arguments but these.
#pragma once

#include "rotary.h"
#include "score.h"
#include "softmax.h"

namespace fastattn::FASTATTN_ISA {

// With this few queries a head's keys are read once, as they lie, and the work is cut along the keys. Asks for head_dim
// and value_dim next to each other in memory.
constexpr int64_t kFewQueries = 8;

void attention_few_queries(const AttentionForward& args, const NewTokens& tokens);  // attention_decode.cpp

// out = weighted / total, lse = log of the sum of exp2(top) * total; zeros and -inf for a row without keys.
template <class T>
FASTATTN_INLINE void finish_row(const AttentionForward& args, const Score& score, const Sequence& seq, int64_t b,
                                int64_t h, int64_t i, const float* weighted, float top, float total) {
    const int64_t token = seq.q_begin + i, stride = args.out.stride[3], dim = args.value.size[3];
    const bool none = total == 0.0f;
    const float scale = none ? 0.0f : 1.0f / total;
    T* out = args.out.as<T>() + offset_of(args.out, b, h, token);
    int64_t c = 0;
    if (stride == 1) {
        for (; c + kLanes <= dim; c += kLanes) store(out + c, none ? Vec{} : load(weighted + c) * scale);
    }
    for (; c < dim; ++c) from_float(none ? 0.0f : weighted[c] * scale, out[c * stride]);
    args.lse.as<float>()[offset_of(args.lse, b, h, token)] =
        none ? -kInfinity : static_cast<float>(score.natural(top) + log(static_cast<double>(total)));
}

}  // namespace fastattn::FASTATTN_ISA
