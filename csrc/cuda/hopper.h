// The instructions of Hopper (sm_90a) that attention_hopper.cu is written in: barriers in shared memory, the tensor copy
// engine (TMA), and the matrix unit of a warpgroup (wgmma). Over the emulation, tests/cuda_emulator/hopper_emulator.h has the
// same functions. Elsewhere a kernel that uses them is empty: FASTATTN_HOPPER_CODE says whether it is to be compiled.
//
// A tile in shared memory has rows of 128 bytes, 64 elements; wider rows stand in panels, one behind the other. The copy
// engine writes it swizzled, and the matrix unit reads it so: of a row's eight pieces of 16 bytes, piece p of row r stands at
// place p ^ (r % 8). A tile begins at a multiple of 1024 bytes.
#pragma once

#include "device.h"

#ifdef FASTATTN_CUDA_EMULATED
#    include "hopper_emulator.h"
#    define FASTATTN_HOPPER_CODE 1
#else
#    include <cuda.h>
#    if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#        define FASTATTN_HOPPER_CODE 1
#    endif

namespace fastattn::cuda {

constexpr int kWarpgroup = 128;

__device__ inline uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ inline unsigned char* dynamic_shared() {
    extern __shared__ __align__(1024) unsigned char bytes[];
    return bytes;
}

// ---- Barriers in shared memory --------------------------------------------------------------------------------------

// Completes a phase when `count` arrivals have come, and the bytes that were announced. Phases alternate between 0 and 1.
struct Barrier {
    uint64_t state;

    __device__ void init(int count) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(this)), "r"(count) : "memory");
    }
    __device__ void arrive() {
        asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(this)) : "memory");
    }
    __device__ void arrive_and_expect(int bytes) {
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(this)), "r"(bytes)
                     : "memory");
    }
    // Until the phase of this parity has completed; of a new barrier, phase 1 counts as completed.
    __device__ void wait(int parity) {
        uint32_t done = 0;
        while (!done) {
            asm volatile(
                "{\n"
                ".reg .pred p;\n"
                "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                "selp.u32 %0, 1, 0, p;\n"
                "}\n"
                : "=r"(done)
                : "r"(shared_address(this)), "r"(parity)
                : "memory");
        }
    }
};

// Makes barriers that one thread initialised visible to the copy engine; a __syncthreads follows.
__device__ inline void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Waits for `threads` threads at the barrier of this number; arrive does not wait itself.
__device__ inline void named_sync(int number, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}
__device__ inline void named_arrive(int number, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// Registers a thread of this warpgroup may have from here on.
template <int kCount>
__device__ inline void give_up_registers() {
#    ifdef FASTATTN_HOPPER_CODE
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
#    endif
}
template <int kCount>
__device__ inline void take_registers() {
#    ifdef FASTATTN_HOPPER_CODE
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
#    endif
}

// ---- The copy engine ------------------------------------------------------------------------------------------------

// A tensor of 16-bit elements with four dimensions, the first one contiguous, and the box of it that one copy brings.
using TensorMap = CUtensorMap;

// The box at this place into shared memory, zeros where the tensor has ended; the barrier counts its bytes.
__device__ inline void load_box(const TensorMap& map, Barrier& barrier, void* to, int x, int y, int z, int w) {
#    ifdef FASTATTN_HOPPER_CODE
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
        "[%2];" ::"r"(shared_address(to)),
        "l"(&map), "r"(shared_address(&barrier)), "r"(x), "r"(y), "r"(z), "r"(w)
        : "memory");
#    endif
}

// Throws where the driver refuses. `strides` of the last three dimensions, in bytes, multiples of 16.
inline TensorMap make_tensor_map(bool bfloat16, const void* address, const uint64_t (&sizes)[4],
                                 const uint64_t (&strides)[3], const uint32_t (&box)[4]) {
    using Encode = decltype(&cuTensorMapEncodeTiled);
    static const Encode encode = [] {
        void* found = nullptr;  // from the driver that is loaded, so that nothing has to be linked
        cudaDriverEntryPointQueryResult result;
#    if CUDART_VERSION >= 12050
        const cudaError_t error =
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#    else
        const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#    endif
        return reinterpret_cast<Encode>(error == cudaSuccess ? found : nullptr);
    }();
    if (encode == nullptr) throw std::runtime_error("CUDA: the driver has no cuTensorMapEncodeTiled; it is too old");
    TensorMap map;
    const uint32_t steps[4] = {1, 1, 1, 1};
    const CUresult result =
        encode(&map, bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4,
               const_cast<void*>(address), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
               CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS)
        throw std::runtime_error("CUDA: cuTensorMapEncodeTiled returned " + std::to_string(static_cast<int>(result)));
    return map;
}

// ---- The matrix unit of a warpgroup ---------------------------------------------------------------------------------

__device__ inline void matrix_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void matrix_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most so many of the groups that were committed are still at work.
template <int kPending>
__device__ inline void matrix_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// The compiler does not move what it computes from these registers over the place of this call.
template <int kSize>
__device__ inline void pin(float (&x)[kSize]) {
    for (int i = 0; i < kSize; ++i) asm volatile("" : "+f"(x[i])::"memory");
}

#    define FASTATTN_8(x, i)                                                                                        \
        "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3]), "+f"(x[i + 4]), "+f"(x[i + 5]), "+f"(x[i + 6]), \
            "+f"(x[i + 7])
#    define FASTATTN_32(x, i) FASTATTN_8(x, i), FASTATTN_8(x, i + 8), FASTATTN_8(x, i + 16), FASTATTN_8(x, i + 24)
#    define FASTATTN_NAMES_32                                                                                       \
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, " \
        "%23, "                                                                                                     \
        "%24, %25, %26, %27, %28, %29, %30, %31"
#    define FASTATTN_NAMES_64                                                                                         \
        FASTATTN_NAMES_32                                                                                             \
        ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, " \
        "%53, "                                                                                                       \
        "%54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// sums (64, 128) += a (64, 16) b (128, 16)ᵀ, both described tiles whose rows lie along the 16; sums = … without `add`.
#    define FASTATTN_SCORES(type)                                                                                  \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\nwgmma.mma_async.sync.aligned.m64n128k16.f32." type \
                     "." type " {" FASTATTN_NAMES_64 "}, %64, %65, p, 1, 1, 0, 0;\n}\n"                            \
                     : FASTATTN_32(sums, 0), FASTATTN_32(sums, 32)                                                 \
                     : "l"(a), "l"(b), "r"(add))
template <class T>
__device__ inline void multiply_scores(float (&sums)[64], uint64_t a, uint64_t b, int add) {
#    ifdef FASTATTN_HOPPER_CODE
    if constexpr (kIsBFloat16<T>) {
        FASTATTN_SCORES("bf16");
    } else {
        FASTATTN_SCORES("f16");
    }
#    endif
}

// sums (64, 2 kSize) += a (64, 16), in registers, times b (16, 2 kSize), a described tile whose rows lie across the 16.
#    define FASTATTN_VALUES_128(type)                                                                    \
        asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" FASTATTN_NAMES_64 \
                     "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"                                         \
                     : FASTATTN_32(sums, 0), FASTATTN_32(sums, 32)                                       \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#    define FASTATTN_VALUES_64(type)                                                                    \
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" FASTATTN_NAMES_32 \
                     "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"                                        \
                     : FASTATTN_32(sums, 0)                                                             \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
template <class T, int kSize>
__device__ inline void multiply_values(float (&sums)[kSize], const uint32_t (&a)[4], uint64_t b) {
    static_assert(kSize == 32 || kSize == 64);
#    ifdef FASTATTN_HOPPER_CODE
    if constexpr (kSize == 64 && kIsBFloat16<T>) {
        FASTATTN_VALUES_128("bf16");
    } else if constexpr (kSize == 64) {
        FASTATTN_VALUES_128("f16");
    } else if constexpr (kIsBFloat16<T>) {
        FASTATTN_VALUES_64("bf16");
    } else {
        FASTATTN_VALUES_64("f16");
    }
#    endif
}

__device__ inline float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Two numbers in 16 bits each, the first one in the low half.
template <class T>
__device__ inline uint32_t pair_of(float low, float high) {
    uint32_t pair;
    if constexpr (kIsBFloat16<T>) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    } else {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    }
    return pair;
}

}  // namespace fastattn::cuda
#endif

namespace fastattn::cuda {

// What the matrix unit is told of a tile: where it begins and how far it is, in bytes, from eight rows to the next eight, and
// from one panel to the next where rows lie across the product's depth (where they lie along it, nobody asks).
// Source: PTX ISA, "Asynchronous Warpgroup Level Matrix Shared Memory Layout".
__device__ inline uint64_t describe_tile(uint32_t address, int panel_bytes) {
    constexpr uint64_t kEightRows = 8 * 128, kSwizzle128 = 1;
    return (address & 0x3ffff) >> 4 | static_cast<uint64_t>(panel_bytes >> 4) << 16 | kEightRows >> 4 << 32 |
           kSwizzle128 << 62;
}

}  // namespace fastattn::cuda
