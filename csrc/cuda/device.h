// What kernels in csrc/cuda are written in: CUDA, or, with FASTATTN_CUDA_EMULATED, its emulation on the processor
// (tests/cuda_emulator), in which the same sources are compiled by the C++ compiler and their numerics tested.
#pragma once

#include <stdint.h>

#ifdef FASTATTN_CUDA_EMULATED
#    include "cuda_emulator.h"
#else
#    include <cuda_bf16.h>
#    include <cuda_fp16.h>
#    include <cuda_runtime.h>

#    include <stdexcept>
#    include <string>
#endif

namespace fastattn::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// ---- 16-bit floating types as they lie in memory --------------------------------------------------------------------

struct BFloat16 {
    uint16_t bits;
};
struct Half {
    uint16_t bits;
};

#ifdef FASTATTN_CUDA_EMULATED
inline float to_float(Half x) { return emulated::float_of_half(x.bits); }
inline float to_float(BFloat16 x) { return emulated::float_of_bfloat16(x.bits); }
inline void from_float(float x, Half& to) { to.bits = emulated::half_of_float(x); }
inline void from_float(float x, BFloat16& to) { to.bits = emulated::bfloat16_of_float(x); }
#else
__device__ inline float to_float(Half x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ inline float to_float(BFloat16 x) { return __bfloat162float(__ushort_as_bfloat16(x.bits)); }
__device__ inline void from_float(float x, Half& to) { to.bits = __half_as_ushort(__float2half_rn(x)); }
__device__ inline void from_float(float x, BFloat16& to) { to.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
#endif
__device__ inline float to_float(float x) { return x; }
__device__ inline void from_float(float x, float& to) { to = x; }

template <class T>
constexpr bool kIsBFloat16 = false;
template <>
constexpr bool kIsBFloat16<BFloat16> = true;

// x as a T holds it.
template <class T>
__device__ inline float rounded(float x) {
    T narrow;
    from_float(x, narrow);
    return to_float(narrow);
}

// ---- Accesses of 16 bytes -------------------------------------------------------------------------------------------

// Sixteen bytes of elements: what one thread reads or writes in one instruction where addresses are aligned to that.
template <class T>
struct alignas(16) Vector {
    static constexpr int kSize = 16 / sizeof(T);
    T element[kSize];
};

// Elements column … column + kSize - 1 of a row of `columns`; zeros beyond its end. kAligned: the row begins at a
// multiple of 16 bytes and has a multiple of kSize columns, so a vector is inside or outside as a whole.
template <class T, bool kAligned>
__device__ inline Vector<T> load(const T* row, int64_t column, int64_t columns) {
    Vector<T> found{};
    if (kAligned) {
        if (column < columns) found = *reinterpret_cast<const Vector<T>*>(row + column);
    } else {
        for (int i = 0; i < Vector<T>::kSize; ++i) {
            if (column + i < columns) found.element[i] = row[column + i];
        }
    }
    return found;
}

template <class T, bool kAligned>
__device__ inline void load(const T* row, int64_t column, int64_t columns, float (&to)[Vector<T>::kSize]) {
    const Vector<T> found = load<T, kAligned>(row, column, columns);
    for (int i = 0; i < Vector<T>::kSize; ++i) to[i] = to_float(found.element[i]);
}

template <class T, bool kAligned>
__device__ inline void store(T* row, int64_t column, int64_t columns, const float (&from)[Vector<T>::kSize]) {
    constexpr int kSize = Vector<T>::kSize;
    if (kAligned) {
        Vector<T> vector;
        for (int i = 0; i < kSize; ++i) from_float(from[i], vector.element[i]);
        if (column < columns) *reinterpret_cast<Vector<T>*>(row + column) = vector;
    } else {
        for (int i = 0; i < kSize; ++i) {
            if (column + i < columns) from_float(from[i], row[column + i]);
        }
    }
}

// ---- Sums over the threads of a row ---------------------------------------------------------------------------------

// Over neighbouring lanes, a power of two of them; the same bits for all.
template <int kLanes>
__device__ inline float sum_of_lanes(float x) {
    for (int distance = kLanes / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
    return x;
}

__device__ inline float sum_of_warp(float x) { return sum_of_lanes<kWarp>(x); }

// The same bits for all threads that share a row: a warp, or (kBlock) the block, through `shared`, a float a warp.
template <bool kBlock>
__device__ inline float sum_of_row(float x, float* shared) {
    x = sum_of_warp(x);
    if (!kBlock) return x;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
    __syncthreads();  // the last sum has been read
    if (lane == 0) shared[warp] = x;
    __syncthreads();
    return sum_of_warp(lane < warps ? shared[lane] : 0.0f);
}

// ---- Dropout --------------------------------------------------------------------------------------------------------

// The hash of fastattn/backends/eager/dropout.py, which defines it.
__device__ inline uint32_t mix32(uint32_t x) {
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    return x ^ (x >> 16);
}

struct Dropout {
    const int64_t* seed;  // null without dropout
    uint64_t threshold;   // floor(dropout_p * 2^32)
    float scale;          // of what is kept: 1 / (1 - dropout_p), or 0

    __device__ uint64_t row_key(int64_t row) const {
        uint64_t z = static_cast<uint64_t>(*seed) + static_cast<uint64_t>(row) * 0x9e3779b97f4a7c15u;
        z += 0x9e3779b97f4a7c15u;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        return z ^ (z >> 31);
    }

    __device__ float apply(uint64_t key, int64_t column, float x) const {
        const uint32_t low = static_cast<uint32_t>(key), high = static_cast<uint32_t>(key >> 32);
        const uint32_t u = mix32(static_cast<uint32_t>(column) ^ low) ^ high;
        return mix32(u) >= threshold ? x * scale : 0.0f;
    }
};

// ---- Launching ------------------------------------------------------------------------------------------------------

inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// A number as a type, for the choice of a kernel's variant.
template <auto kValue>
struct Constant {
    static constexpr auto value = kValue;
};

#ifndef FASTATTN_CUDA_EMULATED
// Starts a kernel on a stream. Throws where CUDA refuses it; what goes wrong later, torch reports at its next call.
template <class Arguments>
void launch(void (*kernel)(Arguments), int64_t blocks, int threads, void* stream, const Arguments& arguments,
            int dynamic_shared_bytes = 0) {
    if (blocks == 0) return;
    auto check = [](cudaError_t error) {
        if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
    };
    if (dynamic_shared_bytes > 48 * 1024) {
        const void* function = reinterpret_cast<const void*>(kernel);
        check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, dynamic_shared_bytes));
    }
    kernel<<<static_cast<unsigned>(blocks), threads, dynamic_shared_bytes, static_cast<cudaStream_t>(stream)>>>(
        arguments);
    check(cudaGetLastError());
}
#endif

}  // namespace fastattn::cuda
