// What the two ways that attention runs forward share. Both compute the same formula (attention_forward.cpp), for any
// arguments but these.
#pragma once

#include "score.h"

namespace fastattn::FASTATTN_ISA {

// With this few queries a head's keys are read once, as they lie, and the work is cut along the keys. Asks for head_dim
// and value_dim next to each other in memory.
constexpr int64_t kFewQueries = 4;

void attention_few_queries(const AttentionForward& args);  // attention_decode.cpp

// A row of `columns` (whole vectors) scores becomes the weights exp2(factor * score - top), in place; returns their
// sum. `top` is at least every factor * score, or -inf if there is none.
FASTATTN_INLINE float exponentials(float factor, float top, int64_t columns, float* row) {
    const Vec base = splat(top == -kInfinity ? 0.0f : top);
    Vec even{}, odd{};
    int64_t c = 0;
    for (; c + 2 * kLanes <= columns; c += 2 * kLanes) {
        const Vec first = exp2_bounded(load(row + c) * factor - base);
        const Vec second = exp2_bounded(load(row + c + kLanes) * factor - base);
        even += first;
        odd += second;
        store(row + c, first);
        store(row + c + kLanes, second);
    }
    if (c < columns) {
        const Vec last = exp2_bounded(load(row + c) * factor - base);
        even += last;
        store(row + c, last);
    }
    return reduce_add(even + odd);
}

// The greatest of `columns` (whole vectors) scores; -inf if all are NaN.
FASTATTN_INLINE float greatest(const float* row, int64_t columns) {
    Vec top = splat(-kInfinity), other = top;
    int64_t c = 0;
    for (; c + 2 * kLanes <= columns; c += 2 * kLanes) {
        top = max(load(row + c), top);
        other = max(load(row + c + kLanes), other);
    }
    if (c < columns) top = max(load(row + c), top);
    return reduce_max(max(top, other));
}

// out = weighted / total, lse = log of the sum of exp2(top) * total; zeros and -inf for a row without keys.
template <class T>
FASTATTN_INLINE void finish_row(const AttentionForward& args, const Sequence& seq, int64_t b, int64_t h, int64_t i,
                                const float* weighted, float top, float total) {
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
        none ? -kInfinity : static_cast<float>(top * 0.6931471805599453 + log(static_cast<double>(total)));
}

}  // namespace fastattn::FASTATTN_ISA
