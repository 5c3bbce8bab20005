// A row of scores becomes weights.
#pragma once

#include "math.h"
#include "simd.h"

namespace fastattn::FASTATTN_ISA {

// A row of `columns` (whole vectors) scores becomes the weights exp2(factor * score - top), in place; returns their
// sum. `top` is the greatest factor * score, rounded, or more, or -inf if there is none.
FASTATTN_INLINE float exponentials(float factor, float top, int64_t columns, float* row) {
    if (top > 0x1p24f || top < -0x1p24f) {
        // Multiplied and subtracted in one step, the greatest score would differ from its own rounding by whole numbers.
        for (int64_t c = 0; c < columns; c += kLanes) store(row + c, load(row + c) * factor);
        factor = 1.0f;
    }
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

}  // namespace fastattn::FASTATTN_ISA
