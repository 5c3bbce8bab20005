// How the rows of a norm are shared out among threads, and the choice of a kernel's variant.
//
//     a row by a warp    up to kFewest vectors a lane; 4 warps a block
//     a row by a block   64 to 1024 threads, as few as take the row with kFewest vectors each; the longest rows, of 16384
//                        features, take 2 vectors a thread in 16 bits and 4 in float32
//
// A thread holds its vectors of 16 bytes in registers, vector v of thread t beginning at column (v * threads + t) * kSize,
// so that neighbouring threads read neighbouring memory.
#pragma once

#include "device.h"
#include "norm.h"

namespace fastattn::cuda {

constexpr int kWarpsOfBlock = 4;
constexpr int kMostThreads = 1024;
constexpr int64_t kMostFeatures = 16384;  // more would not leave a thread registers enough

struct RowPlan {
    bool block;   // a row by a block
    int threads;  // of a block
    int vectors;  // a thread: 1, 2 or 4

    int rows_of_block() const { return block ? 1 : kWarpsOfBlock; }
};

// kFewest: how many vectors a thread takes before more threads do, 1 or 2.
template <int kFewest>
RowPlan plan_rows(int64_t dim, int element_size) {
    const int64_t vectors = (dim * element_size + 15) / 16;
    auto rounded = [](int64_t n) { return n <= 1 ? 1 : n <= 2 ? 2 : 4; };
    if (vectors <= kWarp * kFewest) return {false, kWarp * kWarpsOfBlock, rounded((vectors + kWarp - 1) / kWarp)};
    int threads = 2 * kWarp;
    while (threads < kMostThreads && int64_t{threads} * kFewest < vectors) threads *= 2;
    return {true, threads, rounded((vectors + threads - 1) / threads)};
}

// Calls body(T{}, W{}, vectors, block, aligned) with the types of a call and its plan's numbers as Constants. Only what
// plan_rows<kFewest> gives is compiled.
template <int kFewest, class Body>
void with_variant(DType dtype, DType weight_dtype, const RowPlan& plan, bool aligned, const Body& body) {
    auto with_alignment = [&](auto t, auto w, auto vectors, auto block) {
        aligned ? body(t, w, vectors, block, Constant<true>{}) : body(t, w, vectors, block, Constant<false>{});
    };
    auto with_plan = [&](auto t, auto w) {
        if (plan.block) {
            if constexpr (sizeof(t) == 4) {
                if (plan.vectors == 4) return with_alignment(t, w, Constant<4>{}, Constant<true>{});
            }
            if (plan.vectors == 2) return with_alignment(t, w, Constant<2>{}, Constant<true>{});
        }
        if constexpr (kFewest == 2) {
            if (plan.vectors == 2) return with_alignment(t, w, Constant<2>{}, Constant<false>{});
        } else {
            if (plan.block) return with_alignment(t, w, Constant<1>{}, Constant<true>{});
        }
        with_alignment(t, w, Constant<1>{}, Constant<false>{});
    };
    auto with_weight = [&](auto t) {
        // weight and bias have the rows' dtype or float32.
        weight_dtype == DType::kFloat32 ? with_plan(t, float{}) : with_plan(t, t);
    };
    if (dtype == DType::kFloat32) return with_plan(float{}, float{});
    if (dtype == DType::kBFloat16) return with_weight(BFloat16{});
    with_weight(Half{});
}

// A parameter's elements for the columns of a vector of T, one at a time: they lie in the caches.
template <class T, class W>
__device__ inline void load_parameter(const W* from, int64_t column, int64_t columns, float (&to)[Vector<T>::kSize]) {
    for (int i = 0; i < Vector<T>::kSize; ++i) to[i] = column + i < columns ? to_float(from[column + i]) : 0.0f;
}

inline Dropout dropout_of(const int64_t* seed, double dropout_p) {
    return {seed, static_cast<uint64_t>(dropout_p * 4294967296.0),
            dropout_p < 1.0 ? static_cast<float>(1.0 / (1.0 - dropout_p)) : 0.0f};
}

}  // namespace fastattn::cuda
