// Dropout by a counter-based hash of (seed, row, column), the same elements as backends/eager/dropout.py drops:
//
//     key  = splitmix64(seed + row * 0x9E3779B97F4A7C15)                           all of it wraps at 64 bits
//     keep = mix32(mix32(column ^ low32(key)) ^ high32(key)) >= floor(dropout_p * 2^32)
//
// Kept values are multiplied by 1 / (1 - dropout_p). splitmix64 is Steele, Lea and Flood's (OOPSLA 2014), mix32 is
// Wellons' lowbias32 (2018). One 64-bit hash a row; two 32-bit hashes an element, on kLanes elements at once.
#pragma once

#include <stdint.h>

namespace fastattn::FASTATTN_ISA {

typedef uint32_t HashVec __attribute__((vector_size(4 * FASTATTN_LANES)));
// All bits set in the lanes that keep their value, none in the others: what comparing float vectors gives, too.
typedef int32_t KeepVec __attribute__((vector_size(4 * FASTATTN_LANES)));

template <class U32>  // uint32_t or HashVec
inline U32 mix32(U32 x) {
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    x ^= x >> 16;
    return x;
}

inline uint64_t splitmix64(uint64_t z) {
    z += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

// first, first + 1, … in the lanes.
inline HashVec hash_lanes(uint32_t first) {
    HashVec lanes;
    for (int i = 0; i < FASTATTN_LANES; ++i) lanes[i] = first + static_cast<uint32_t>(i);
    return lanes;
}

struct RowKey {
    uint32_t low, high;
};

class Dropout {
  public:
    Dropout(double dropout_p, uint64_t seed)
        : seed_(seed),
          keeps_any_(dropout_p < 1.0),
          threshold_(keeps_any_ ? static_cast<uint32_t>(dropout_p * 4294967296.0) : 0),
          scale_(keeps_any_ ? static_cast<float>(1.0 / (1.0 - dropout_p)) : 0.0f) {}

    // What kept values are multiplied by.
    float scale() const { return scale_; }

    RowKey row(uint64_t row) const {
        const uint64_t key = splitmix64(seed_ + row * 0x9E3779B97F4A7C15u);
        return {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)};
    }

    bool keep(RowKey row, uint32_t column) const {
        return keeps_any_ && mix32(mix32(column ^ row.low) ^ row.high) >= threshold_;
    }

    // Lane i says whether (row, column + i) is kept.
    KeepVec keep_columns(RowKey row, uint32_t column) const {
        return compare(mix32(mix32(hash_lanes(column) ^ row.low) ^ row.high));
    }

    // Lane i says whether (row i, column) is kept, for rows whose keys lie in lanes.
    KeepVec keep_rows(HashVec low, HashVec high, uint32_t column) const {
        return compare(mix32(mix32(column ^ low) ^ high));
    }

  private:
    KeepVec compare(HashVec hash) const { return keeps_any_ ? KeepVec(hash >= threshold_) : KeepVec{}; }

    uint64_t seed_;
    bool keeps_any_;
    uint32_t threshold_;
    float scale_;
};

}  // namespace fastattn::FASTATTN_ISA
