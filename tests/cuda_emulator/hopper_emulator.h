// Hopper's barriers in shared memory, copy engine and matrix unit, as csrc/cuda/hopper.h has them, on the processor. Tiles are
// swizzled and described as there, by the rules of the PTX manual, so that a wrong description gives wrong numbers.
//
// Copies and products happen when they are begun. So what does not show is that something waits too little for them, or gives
// memory free too early to be overwritten by a copy that is faster than this one.
#pragma once

#include <math.h>
#include <string.h>

#include <cstdint>
#include <stdexcept>

namespace fastattn::cuda {

constexpr int kWarpgroup = 128;

inline unsigned char* dynamic_shared() {
    alignas(1024) static unsigned char bytes[227 << 10];
    return bytes;
}

inline uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - dynamic_shared());
}

// ---- Barriers in shared memory --------------------------------------------------------------------------------------

struct Barrier {
    int count, missing, phase;
    int64_t bytes;  // announced and not yet here

    void init(int arrivals) { *this = {arrivals, arrivals, 0, 0}; }
    void arrive() {
        if (missing == 0) throw std::runtime_error("CUDA emulator: more arrivals at a barrier than it counts");
        --missing;
        complete();
    }
    void arrive_and_expect(int expected) {
        bytes += expected;
        arrive();
    }
    void deliver(int64_t brought) {
        bytes -= brought;
        complete();
    }
    void wait(int parity) {
        emulated::Block::current_block()->wait_until([&] { return phase % 2 != parity; });
    }

  private:
    void complete() {
        if (missing != 0 || bytes != 0) return;
        missing = count;
        ++phase;
    }
};

inline void publish_barriers() {}

namespace emulated_named {
struct Named {
    int arrived = 0;
    int64_t phase = 0;
};
inline Named barriers[16];

inline void arrive(int number, int threads) {
    Named& named = barriers[number];
    if (++named.arrived == threads) {
        named.arrived = 0;
        ++named.phase;
    }
}
}  // namespace emulated_named

inline void named_arrive(int number, int threads) { emulated_named::arrive(number, threads); }
inline void named_sync(int number, int threads) {
    const int64_t before = emulated_named::barriers[number].phase;
    emulated_named::arrive(number, threads);
    emulated::Block::current_block()->wait_until([&] { return emulated_named::barriers[number].phase != before; });
}

template <int kCount>
void give_up_registers() {}
template <int kCount>
void take_registers() {}

// ---- The copy engine ------------------------------------------------------------------------------------------------

struct TensorMap {
    const unsigned char* address;
    uint64_t sizes[4], strides[3];
    uint32_t box[4];
};

inline TensorMap make_tensor_map(bool, const void* address, const uint64_t (&sizes)[4], const uint64_t (&strides)[3],
                                 const uint32_t (&box)[4]) {
    TensorMap map;
    map.address = static_cast<const unsigned char*>(address);
    if (reinterpret_cast<uintptr_t>(address) % 16 != 0) throw std::runtime_error("CUDA: the tensor is not aligned");
    for (uint64_t stride : strides) {
        if (stride % 16 != 0 || stride == 0) throw std::runtime_error("CUDA: a stride is no multiple of 16 bytes");
    }
    if (box[0] * 2 != 128 || box[1] > 256 || box[2] != 1 || box[3] != 1)
        throw std::runtime_error("CUDA: a box that is not emulated");
    memcpy(map.sizes, sizes, sizeof(sizes));
    memcpy(map.strides, strides, sizeof(strides));
    memcpy(map.box, box, sizeof(box));
    return map;
}

// Where the 16 bytes are of which the address would be this one without the swizzle.
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

inline void load_box(const TensorMap& map, Barrier& barrier, void* to, int x, int y, int z, int w) {
    const uint32_t begin = shared_address(to);
    if (begin % 1024 != 0) throw std::runtime_error("CUDA emulator: a tile does not begin at a multiple of 1024 bytes");
    for (uint32_t row = 0; row < map.box[1]; ++row) {
        for (uint32_t piece = 0; piece < 8; ++piece) {
            unsigned char* place = dynamic_shared() + swizzled(begin + row * 128 + piece * 16);
            const uint64_t column = x + piece * 8, token = y + row;
            const bool inside = column < map.sizes[0] && token < map.sizes[1] && uint64_t(z) < map.sizes[2] &&
                                uint64_t(w) < map.sizes[3];
            if (inside) {
                memcpy(place,
                       map.address + column * 2 + token * map.strides[0] + z * map.strides[1] + w * map.strides[2], 16);
            } else {
                memset(place, 0, 16);
            }
        }
    }
    barrier.deliver(int64_t{map.box[1]} * 128);
}

// ---- The matrix unit of a warpgroup ---------------------------------------------------------------------------------

inline void matrix_fence() {}
inline void matrix_commit() {}
template <int kPending>
void matrix_wait() {}
template <int kSize>
void pin(float (&)[kSize]) {}

// A tile as its description says. Rows of the tile have 64 elements.
struct Described {
    uint32_t begin, panel_bytes, eight_rows;

    explicit Described(uint64_t description)
        : begin((description & 0x3fff) << 4),
          panel_bytes((description >> 16 & 0x3fff) << 4),
          eight_rows((description >> 32 & 0x3fff) << 4) {
        if (description >> 62 != 1) throw std::runtime_error("CUDA emulator: only 128 bytes are swizzled");
    }

    // The swizzle goes by the address, whatever the description begins with.
    template <class T>
    float at(uint32_t offset) const {
        const uint32_t address = begin + offset;
        T element;
        memcpy(&element, dynamic_shared() + (swizzled(address & ~15u) | (address & 15)), sizeof(T));
        return to_float(element);
    }

    // Element k of row n, where rows lie along the product's depth.
    template <class T>
    float along(int n, int k) const {
        return at<T>(n / 8 * eight_rows + n % 8 * 128 + k * 2);
    }

    // Element n of row k, where rows lie across it.
    template <class T>
    float across(int n, int k) const {
        return at<T>(n / 64 * panel_bytes + k / 8 * eight_rows + k % 8 * 128 + n % 64 * 2);
    }
};

// The row and the column of a thread's sum.
inline int row_of_sum(int i) {
    const int thread = threadIdx.x % kWarpgroup;
    return thread / kWarp * 16 + thread % kWarp / 4 + i / 2 % 2 * 8;
}
inline int column_of_sum(int i) { return i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2; }

template <class T>
void multiply_scores(float (&sums)[64], uint64_t a, uint64_t b, int add) {
    const Described left(a), right(b);
    for (int i = 0; i < 64; ++i) {
        float sum = add ? sums[i] : 0.0f;
        for (int k = 0; k < 16; ++k) sum += left.along<T>(row_of_sum(i), k) * right.along<T>(column_of_sum(i), k);
        sums[i] = sum;
    }
}

template <class T, int kSize>
void multiply_values(float (&sums)[kSize], const uint32_t (&a)[4], uint64_t b) {
    static uint32_t given[1024][4];  // by thread
    const int thread = threadIdx.x, quad = thread / 4 * 4;
    memcpy(given[thread], a, sizeof(a));
    __syncwarp();
    float left[2][16];  // of the thread's two rows
    for (int k = 0; k < 16; ++k) {
        for (int h = 0; h < 2; ++h) {
            T element;
            const uint32_t pair = given[quad + k % 8 / 2][h + k / 8 * 2];
            element.bits = static_cast<uint16_t>(k % 2 ? pair >> 16 : pair);
            left[h][k] = to_float(element);
        }
    }
    __syncwarp();  // all have taken theirs
    const Described right(b);
    for (int i = 0; i < kSize; ++i) {
        for (int k = 0; k < 16; ++k) sums[i] += left[i / 2 % 2][k] * right.across<T>(column_of_sum(i), k);
    }
}

inline float exp2_fast(float x) { return exp2f(x); }

template <class T>
uint32_t pair_of(float low, float high) {
    T first, second;
    from_float(low, first);
    from_float(high, second);
    return first.bits | static_cast<uint32_t>(second.bits) << 16;
}

}  // namespace fastattn::cuda
