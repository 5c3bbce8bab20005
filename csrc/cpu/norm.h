// What the forward and the backward of the norms share: loops over a row in vectors, sums along a row, and the split of
// the rows among tasks.
#pragma once

#include "dropout.h"
#include "kernels.h"
#include "parallel.h"
#include "simd.h"

namespace fastattn::FASTATTN_ISA::norm {

// Which lanes of a vector lie inside the row: all of them, or the first `count`.
struct Full {};
struct Tail {
    int64_t count;
};

template <class T>
inline Vec load(const T* from, Full) {
    return FASTATTN_ISA::load(from);
}
template <class T>
inline Vec load(const T* from, Tail tail) {  // zeros beyond the row
    return load_partial(from, tail.count);
}
template <class T>
inline void store(T* to, Vec value, Full) {
    FASTATTN_ISA::store(to, value);
}
template <class T>
inline void store(T* to, Vec value, Tail tail) {
    store_partial(to, value, tail.count);
}
inline Vec inside(Vec value, Full) { return value; }
inline Vec inside(Vec value, Tail tail) { return keep_first(value, tail.count); }

// The value that T keeps of a float32.
template <class T>
inline Vec rounded(Vec value) {
    T kept[kLanes];
    FASTATTN_ISA::store(kept, value);
    return FASTATTN_ISA::load(kept);
}

#define FASTATTN_BODY __attribute__((always_inline))

// body(i, k, lanes) for each vector of [begin, end): i is its first element, k in 0 … 3 the sum it belongs to, so that
// four additions are under way at a time.
template <class Body>
inline void each_vector(int64_t begin, int64_t end, const Body& body) {
    int64_t i = begin;
    for (; i + 4 * kLanes <= end; i += 4 * kLanes) {
        body(i, 0, Full{});
        body(i + kLanes, 1, Full{});
        body(i + 2 * kLanes, 2, Full{});
        body(i + 3 * kLanes, 3, Full{});
    }
    for (; i + kLanes <= end; i += kLanes) body(i, 0, Full{});
    if (i < end) body(i, 0, Tail{end - i});
}

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

// weight or bias as float32: itself, converted into `space`, or `absent` everywhere.
inline const float* as_float(const Tensor& vector, int64_t dim, float absent, float* space) {
    if (vector.dtype == DType::kFloat32) return vector.as<float>();
    auto convert = [&](auto* from) {
        each_vector(0, dim,
                    [&](int64_t i, int, auto lanes) FASTATTN_BODY { store(space + i, load(from + i, lanes), lanes); });
    };
    if (vector.dtype == DType::kBFloat16) {
        convert(vector.as<BFloat16>());
    } else if (vector.dtype == DType::kFloat16) {
        convert(vector.as<Half>());
    } else {
        for (int64_t i = 0; i < dim; ++i) space[i] = absent;
    }
    return space;
}

// Calls run(T*, norm) with null pointers of the element type, for the two template arguments of a kernel.
template <Norm kNorm>
struct NormTag {
    static constexpr Norm value = kNorm;
};

template <class Run>
inline void dispatch(DType dtype, Norm norm, const Run& run) {
    auto with_dtype = [&](auto* element) {
        if (norm == Norm::kLayer) {
            run(element, NormTag<Norm::kLayer>{});
        } else {
            run(element, NormTag<Norm::kRms>{});
        }
    };
    if (dtype == DType::kFloat32) {
        with_dtype(static_cast<float*>(nullptr));
    } else if (dtype == DType::kBFloat16) {
        with_dtype(static_cast<BFloat16*>(nullptr));
    } else {
        with_dtype(static_cast<Half*>(nullptr));
    }
}

}  // namespace fastattn::FASTATTN_ISA::norm
