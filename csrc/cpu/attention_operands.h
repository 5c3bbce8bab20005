// The operands of attention's products (tile.h), for each type P of their elements: float, or bfloat16 in pairs where
// the machine multiplies those. Their depth is filled up with zeros to whole kWholeSteps<P>.
#pragma once

#include "sequence.h"
#include "tile.h"

namespace fastattn::FASTATTN_ISA {

// kSteps: steps that one element holds. Weight: one step of a row.
template <class P>
struct Operand;

template <>
struct Operand<float> {
    static constexpr int64_t kSteps = 1;
    typedef float Weight;

    template <class T>
    static void pack(const T* from, int64_t step, int64_t stride, int64_t depth, int64_t columns, float* panel) {
        pack_panel(from, step, stride, depth, columns, panel);
    }
};

template <>
struct Operand<BFloat16Pair> {
    static constexpr int64_t kSteps = 2;
    typedef BFloat16 Weight;

    static void pack(const BFloat16* from, int64_t step, int64_t stride, int64_t depth, int64_t columns,
                     BFloat16Pair* panel) {
        pack_pairs<kTileColumns>(from, step, stride, depth, columns, panel);
        const int64_t steps = ceil_div(depth, kSteps), whole = round_up(steps, kWholeSteps<BFloat16Pair>);
        for (int64_t x = steps * kTileColumns; x < whole * kTileColumns; ++x) panel[x] = {};
    }
};

// Rows of an operand that is read as it lies: `dim` elements, filled up with zeros to whole `steps`. Rows of zeros
// follow up to a multiple of `multiple`.
template <class T, class Weight>
inline void copy_rows(const T* from, int64_t row_stride, int64_t stride, int64_t rows, int64_t dim, int64_t steps,
                      int64_t multiple, Weight* to) {
    const int64_t length = round_up(dim, steps);
    for (int64_t r = 0; r < rows; ++r, from += row_stride, to += length) {
        int64_t c = 0;
        if (stride == 1) {
            for (; c + kLanes <= dim; c += kLanes) store(to + c, load(from + c));
        }
        for (; c < dim; ++c) from_float(to_float(from[c * stride]), to[c]);
        for (; c < length; ++c) from_float(0.0f, to[c]);
    }
    const int64_t rest = (round_up(rows, multiple) - rows) * length;
    for (int64_t x = 0; x < rest; ++x) from_float(0.0f, to[x]);
}

}  // namespace fastattn::FASTATTN_ISA
