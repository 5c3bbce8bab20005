// The turn of rows by their tokens' angles (rotary_embedding.cpp has the formula), for the op and for the attention that
// turns new tokens on the way to a cache. Sines come with rotate's signs: out = x * cos + partner * signed sine.
#pragma once

#include "kernels.h"
#include "matrix.h"

namespace fastattn::FASTATTN_ISA {

// A token's row of cos or sin (batch, seq, rotary_dim).
FASTATTN_INLINE Tensor angles_of(const Tensor& all, int64_t b, int64_t token) {
    Tensor row = all;
    row.data = all.as<char>() + (b * all.stride[0] + token * all.stride[1]) * element_size(all.dtype);
    return row;
}

// The factors of the elements' partners.
template <bool kInterleaved>
inline void sign_sines(const float* from, int64_t rotary, bool inverse, float* to) {
    const int64_t half = rotary / 2, step = kInterleaved ? 2 : 1, partner = kInterleaved ? 1 : half;
    for (int64_t p = 0; p < half; ++p) {
        const float first = from[p * step], second = from[p * step + partner];
        to[p * step] = inverse ? second : -first;
        to[p * step + partner] = inverse ? -first : second;
    }
}

// The first `rotary` elements of a row; `out` may be the row itself.
template <bool kInterleaved, class T, class Streams>
FASTATTN_INLINE void turn_row(const T* x, const float* cos, const float* sin, int64_t rotary, T* out, Streams streams) {
    if constexpr (kInterleaved) {
        each_vector_in_turn(rotary, [=](int64_t i, auto lanes) FASTATTN_BODY {
            const Vec value = load(x + i, lanes);
            const Vec turned = value * load(cos + i, lanes) + swap_neighbours(value) * load(sin + i, lanes);
            put(out + i, turned, streams, lanes);
        });
    } else {
        const int64_t half = rotary / 2;
        each_vector_in_turn(half, [=](int64_t i, auto lanes) FASTATTN_BODY {
            const int64_t j = half + i;
            const Vec one = load(x + i, lanes), two = load(x + j, lanes);
            put(out + i, one * load(cos + i, lanes) + two * load(sin + i, lanes), streams, lanes);
            put(out + j, two * load(cos + j, lanes) + one * load(sin + j, lanes), streams, lanes);
        });
    }
}

// The angles of a call's new tokens, made ready once for all heads. Absent ones turn nothing.
class NewTokens {
  public:
    NewTokens(const Tensor& cos, const Tensor& sin, bool interleaved)
        : rotary_(cos.present() ? cos.size[2] : 0),
          tokens_(cos.present() ? cos.size[1] : 0),
          batches_(cos.stride[0] == 0 && sin.stride[0] == 0 ? smaller(cos.size[0], 1) : cos.size[0]),
          interleaved_(interleaved),
          cos_(batches_ * tokens_ * rotary_),
          sin_(batches_ * tokens_ * rotary_) {
        if (rotary_ == 0) return;
        const int64_t rows = batches_ * tokens_;
        constexpr int64_t kWorthThreads = 1 << 15;  // elements
        const Scratch<float> converted(rotary_, thread_count(rows));
        gemm_detail::for_tasks(rows * rotary_ > kWorthThreads, rows, [&](int64_t row, int thread) {
            const Tensor one_cos = angles_of(cos, row / tokens_, row % tokens_);
            const Tensor one_sin = angles_of(sin, row / tokens_, row % tokens_);
            float* to = cos_.get() + row * rotary_;
            const float* from = as_float(one_cos, rotary_, 0.0f, to);
            if (from != to) memcpy(to, from, rotary_ * sizeof(float));
            from = as_float(one_sin, rotary_, 0.0f, converted.of(thread));
            if (interleaved_) {
                sign_sines<true>(from, rotary_, false, sin_.get() + row * rotary_);
            } else {
                sign_sines<false>(from, rotary_, false, sin_.get() + row * rotary_);
            }
        });
    }

    // In place: a row of a new token of sequence b.
    template <class T>
    void turn(int64_t b, int64_t token, T* row) const {
        if (rotary_ == 0) return;
        const int64_t at = (batches_ == 1 ? token : b * tokens_ + token) * rotary_;
        if (interleaved_) {
            turn_row<true>(row, cos_.get() + at, sin_.get() + at, rotary_, row, std::false_type{});
        } else {
            turn_row<false>(row, cos_.get() + at, sin_.get() + at, rotary_, row, std::false_type{});
        }
    }

  private:
    const int64_t rotary_, tokens_, batches_;
    const bool interleaved_;
    const Scratch<float> cos_, sin_;
};

}  // namespace fastattn::FASTATTN_ISA
