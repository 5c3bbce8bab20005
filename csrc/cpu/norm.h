// What the forward and the backward of the norms share: sums along a row, and the choice of a kernel's template
// arguments.
#pragma once

#include "dropout.h"
#include "kernels.h"
#include "parallel.h"
#include "row.h"

namespace fastattn::FASTATTN_ISA::norm {

template <int kSums>
struct RowSums {
    float value[kSums];
};

// kSums sums along a row: body(i, lanes, sums) adds a vector's terms to sums[0 … kSums - 1], zeros beyond the row. Long
// rows are summed in parts, which keeps the rounding error of a sum of n terms at about n / (4 lanes) up to 4096 terms
// only.
template <int kSums, class Body>
inline RowSums<kSums> row_sums(int64_t dim, const Body& body) {
    constexpr int64_t kPart = 4096;
    Vec total[kSums] = {};
    for (int64_t begin = 0; begin < dim; begin += kPart) {
        Vec part[4][kSums] = {};
        each_vector(begin, begin + kPart < dim ? begin + kPart : dim,
                    [&](int64_t i, int k, auto lanes) FASTATTN_BODY { body(i, lanes, part[k]); });
        for (int s = 0; s < kSums; ++s) total[s] += (part[0][s] + part[1][s]) + (part[2][s] + part[3][s]);
    }
    RowSums<kSums> sums;
    for (int s = 0; s < kSums; ++s) sums.value[s] = reduce_add(total[s]);
    return sums;
}

// Calls run(T*, norm) with null pointers of the element type, for the two template arguments of a kernel.
template <Norm kNorm>
struct NormTag {
    static constexpr Norm value = kNorm;
};

template <class Run>
inline void dispatch(DType dtype, Norm norm, const Run& run) {
    with_dtype(dtype, [&](auto* element) {
        if (norm == Norm::kLayer) {
            run(element, NormTag<Norm::kLayer>{});
        } else {
            run(element, NormTag<Norm::kRms>{});
        }
    });
}

}  // namespace fastattn::FASTATTN_ISA::norm
