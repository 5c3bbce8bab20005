// A row of scores becomes weights.
#pragma once

#include "math.h"
#include "simd.h"

namespace fastattn::FASTATTN_ISA {

// The weight of a key that takes no part. The sign tells it from a weight that is zero by rounding or underflow: that one
// hands on a NaN of its row.
constexpr float kNoWeight = -0.0f;

FASTATTN_INLINE Ints has_no_weight(Vec weight) { return Ints(weight) == Ints(splat(kNoWeight)); }

// A row of `columns` (whole vectors) scores becomes the weights exp2(factor * score - top), in place; returns their
// sum. `top` is the greatest factor * score, rounded, or more, or -inf if there is none. kMark: scores of -inf become
// kNoWeight.
template <bool kMark = false>
FASTATTN_INLINE float exponentials(float factor, float top, int64_t columns, float* row) {
    if (top > 0x1p24f || top < -0x1p24f) {
        // Multiplied and subtracted in one step, the greatest score would differ from its own rounding by whole numbers.
        for (int64_t c = 0; c < columns; c += kLanes) store(row + c, load(row + c) * factor);
        factor = 1.0f;
    }
    const Vec base = splat(top == -kInfinity ? 0.0f : top);
    auto weight_of = [&](Vec score) __attribute__((always_inline)) {
        const Vec weight = exp2_bounded(score * factor - base);
        return kMark ? select(score == splat(-kInfinity), splat(kNoWeight), weight) : weight;
    };
    Vec even{}, odd{};
    int64_t c = 0;
    for (; c + 2 * kLanes <= columns; c += 2 * kLanes) {
        const Vec first = weight_of(load(row + c));
        const Vec second = weight_of(load(row + c + kLanes));
        even += first;
        odd += second;
        store(row + c, first);
        store(row + c + kLanes, second);
    }
    if (c < columns) {
        const Vec last = weight_of(load(row + c));
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

}  // namespace fastattn::FASTATTN_ISA
