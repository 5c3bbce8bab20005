// The matrix unit that some processors have beside their vectors (AMX, Intel from 2023 on), for bfloat16 pairs:
//
//     C (32 x 32)  =  [C +]  A (32 x depth) . B (depth x 32)          in float32, kUnitSteps pairs of depth at a time
//
//                      B: 6 | 7            Eight registers of 16 rows x 64 bytes: four of C, two each of A and B. A step
//                     +---+---+            loads A and B once, 4 KiB, and multiplies each half of A with each half of B:
//      A: 4           | 0 | 1 |            4 x 16 cycles, while the loads take half of that from the first-level cache.
//      ---            +---+---+            C's four parts do not wait for one another.
//         5           | 2 | 3 |
//                     +---+---+
//
// B is a panel as tile.h packs it. A's rows lie along the depth, pairs next to each other. The depth of both is filled
// up with zeros to whole kUnitSteps; A and C have memory for whole tiles of rows, of which those that are too many mean
// nothing. Sums go along the depth, pair after pair; subnormals are flushed to zero.
//
// The registers have to be configured in each thread before (MatrixUnit), which takes 100 ns: once a task.
#pragma once

#include "simd.h"

namespace fastattn::FASTATTN_ISA {

// Steps 2 p (low half) and 2 p + 1 of a row or column.
struct BFloat16Pair {
    uint32_t bits;
};

#ifdef FASTATTN_MATRIX_UNIT
constexpr bool kMatrixUnit = true;
#else
constexpr bool kMatrixUnit = false;
#endif

template <class P>
constexpr bool kOnUnit = false;
template <>
inline constexpr bool kOnUnit<BFloat16Pair> = kMatrixUnit;

constexpr int64_t kUnitRows = 32, kUnitSteps = 16;

// While one lives, this thread's unit is configured for products of P. They do not nest.
template <class P>
class MatrixUnit {
  public:
    MatrixUnit() {
#ifdef __AMX_TILE__
        if constexpr (kOnUnit<P>) {
            struct alignas(64) {
                uint8_t palette, start, reserved[14];
                uint16_t row_bytes[16];
                uint8_t rows[16];
            } layout = {1, 0, {}, {}, {}};
            for (int i = 0; i < 8; ++i) layout.row_bytes[i] = 64, layout.rows[i] = 16;
            __asm__ volatile("" : : "m"(layout));
            _tile_loadconfig(&layout);
        }
#endif
    }
    ~MatrixUnit() {
#ifdef __AMX_TILE__
        if constexpr (kOnUnit<P>) _tile_release();
#endif
    }
    MatrixUnit(const MatrixUnit&) = delete;
    MatrixUnit& operator=(const MatrixUnit&) = delete;
};

namespace detail {
FASTATTN_INLINE float as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
}  // namespace detail

// 16 rows of A or 32, 16 columns of B or 32. `steps` are whole kUnitSteps; strides count pairs, and floats of C.
template <bool kBothRows, bool kBothColumns>
FASTATTN_INLINE void unit_product(int64_t steps, const BFloat16Pair* a, int64_t a_row, const BFloat16Pair* b,
                                  int64_t b_step, float* c, int64_t c_row, bool accumulate) {
#ifdef __AMX_TILE__
    const int64_t a_bytes = a_row * 4, b_bytes = b_step * 4, c_bytes = c_row * 4;
    float* c_low = c + 16 * c_row;
    __asm__ volatile("" : : : "memory");  // the loads below do not tell the compiler that they read memory
    if (accumulate) {
        _tile_loadd(0, c, c_bytes);
        if constexpr (kBothColumns) _tile_loadd(1, c + 16, c_bytes);
        if constexpr (kBothRows) _tile_loadd(2, c_low, c_bytes);
        if constexpr (kBothRows && kBothColumns) _tile_loadd(3, c_low + 16, c_bytes);
    } else {
        _tile_zero(0);
        if constexpr (kBothColumns) _tile_zero(1);
        if constexpr (kBothRows) _tile_zero(2);
        if constexpr (kBothRows && kBothColumns) _tile_zero(3);
    }
    for (int64_t s = 0; s < steps; s += kUnitSteps, a += kUnitSteps, b += kUnitSteps * b_step) {
        _tile_loadd(4, a, a_bytes);
        _tile_loadd(6, b, b_bytes);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (kBothColumns) {
            _tile_loadd(7, b + 16, b_bytes);
            _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (kBothRows) {
            _tile_loadd(5, a + 16 * a_row, a_bytes);
            _tile_dpbf16ps(2, 5, 6);
            if constexpr (kBothColumns) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, c, c_bytes);
    if constexpr (kBothColumns) _tile_stored(1, c + 16, c_bytes);
    if constexpr (kBothRows) _tile_stored(2, c_low, c_bytes);
    if constexpr (kBothRows && kBothColumns) _tile_stored(3, c_low + 16, c_bytes);
#else  // the same places of memory and the same sums, without the unit
    constexpr int kColumns = kBothColumns ? 32 : 16;
    for (int r = 0; r < (kBothRows ? 32 : 16); ++r, a += a_row, c += c_row) {
        float sum[kColumns];
        for (int j = 0; j < kColumns; ++j) sum[j] = accumulate ? c[j] : 0.0f;
        for (int64_t s = 0; s < steps; ++s) {
            for (int j = 0; j < kColumns; ++j) {
                const uint32_t left = a[s].bits, right = b[s * b_step + j].bits;
                sum[j] += detail::as_float(left << 16) * detail::as_float(right << 16);
                sum[j] += detail::as_float(left & 0xffff0000u) * detail::as_float(right & 0xffff0000u);
            }
        }
        for (int j = 0; j < kColumns; ++j) c[j] = sum[j];
    }
#endif
}

}  // namespace fastattn::FASTATTN_ISA
