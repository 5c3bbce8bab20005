// The kernels that every instruction set provides, and their arguments.
//
// To add a kernel: write its argument struct here, add a line to FASTATTN_KERNELS, and define, in a file of csrc/cpu,
//     namespace fastattn::FASTATTN_ISA { void name(const Arguments& args) { … } }
// The list declares the function, puts it in each instruction set's table and checks its type. A binding calls it
// through `kernels().name` (bindings.h).
//
// Kernels trust their arguments: the binding has checked dtypes, ranks and sizes. They throw nothing but
// std::bad_alloc, and that only outside of parallel regions.
#pragma once

#include "tensor.h"

namespace fastattn {

// ---- Layer norm and RMS norm ----------------------------------------------------------------------------------------

enum class Norm : int32_t { kLayer, kRms };

// sum = residual + dropout(x); out = norm(sum) * weight + bias. All but weight and bias are contiguous (rows, dim)
// matrices of one dtype; weight and bias are (dim,) in that dtype or float32; mean and rstd are (rows,) float32.
struct NormForward {
    Norm norm;
    int64_t rows, dim;
    Tensor x, weight, bias, residual;  // all but x may be absent
    Tensor out, sum, mean, rstd;       // sum absent where it equals x; mean absent for RMS norm
    float eps;
    double dropout_p;  // 0: no dropout, seed unused
    uint64_t seed;
};

// grad_residual = d sum; grad_x = dropout mask * d sum, absent without dropout. grad_out, grad_sum and sum as above.
struct NormBackward {
    Norm norm;
    int64_t rows, dim;
    Tensor grad_out, grad_sum, sum, weight, mean, rstd;    // grad_sum, weight and mean may be absent
    Tensor grad_residual, grad_x, grad_weight, grad_bias;  // all but grad_residual may be absent
    double dropout_p;
    uint64_t seed;
};

// ---- Attention, forward ---------------------------------------------------------------------------------------------

// ---- Attention, backward --------------------------------------------------------------------------------------------

// ---- Linear and feed-forward ----------------------------------------------------------------------------------------

// clang-format off
// X(function, arguments)
#define FASTATTN_KERNELS(X)                                  \
    /* layer norm and RMS norm */                            \
                                                             \
    /* attention, forward */                                 \
                                                             \
    /* attention, backward */                                \
                                                             \
    /* linear and feed-forward */

// clang-format on

struct Kernels {
    const char* isa;
    int lanes;
#define FASTATTN_FIELD(function, Arguments) void (*function)(const Arguments&);
    FASTATTN_KERNELS(FASTATTN_FIELD)
#undef FASTATTN_FIELD
};

// ---- The choice of instruction set (isa.cpp) ------------------------------------------------------------------------

// The table in use: the best that was built and that this machine runs, or the one that the environment variable
// FASTATTN_CPU_ISA names. Throws std::invalid_argument if that one cannot be used.
const Kernels& kernels();

// Uses another instruction set from now on, in all threads. Throws std::invalid_argument if it cannot be used.
void select_isa(const char* name);

// The i-th usable instruction set (built, and this machine runs it), the best first, emulated ones last; null after
// them.
const char* usable_isa(int i);

}  // namespace fastattn
