// From the product of a query and keys to their scores, in the order that docs/architecture.md gives:
//
//     s = scale * x;   s = softcap * tanh(s / softcap);   s -= slope * |i + diagonal - j|;   s += mask  or  -inf
//
// kept in units of log 2 (times log2 e), because the softmax takes exp2. log2 e goes into each term's factor, so that the
// sum is rounded as often as eager's. A row of scores is changed in place, a vector of keys at a time. Where nothing but the
// scale applies (`plain`), the caller folds it into its exp2 instead.
#pragma once

#include "dropout.h"
#include "math.h"
#include "sequence.h"
#include "simd.h"
#include "softmax.h"

namespace fastattn::FASTATTN_ISA {

typedef uint8_t Bytes __attribute__((vector_size(FASTATTN_LANES)));

namespace detail {

// Elements j … j + n - 1 (n <= kLanes) of a row with any stride: what is added to a score, or whether a key takes part.
template <class T>
FASTATTN_INLINE Vec mask_vector(const T* row, int64_t stride, int64_t j, int64_t n) {
    if (stride == 1) return n == kLanes ? load(row + j) : load_partial(row + j, n);
    if (stride == 0) return splat(to_float(*row));
    T lanes[kLanes] = {};
    for (int64_t i = 0; i < n; ++i) lanes[i] = row[(j + i) * stride];
    return load(lanes);
}

FASTATTN_INLINE Ints mask_vector(const uint8_t* row, int64_t stride, int64_t j, int64_t n) {
    uint8_t lanes[kLanes] = {};
    if (stride == 1 && n == kLanes) {
        memcpy(lanes, row + j, kLanes);
    } else {
        for (int64_t i = 0; i < n; ++i) lanes[i] = row[(j + i) * stride];
    }
    Bytes bytes;
    memcpy(&bytes, lanes, sizeof bytes);
    return __builtin_convertvector(bytes, Ints) != 0;
}

// A score, and the same in units of log 2.
struct TwoUnits {
    Vec natural, base_two;

    FASTATTN_INLINE void mask(Vec added) {
        natural += added;
        base_two += added * kLog2E;
    }
    FASTATTN_INLINE void mask(Ints takes_part) { natural = select(takes_part, natural, splat(-kInfinity)); }

    // In units of log 2. A finite score stays finite, and its key takes part: masks are made of the lowest float, too. From
    // -1.7e38 down, short of where the score times log2 e overflows, score / 2 - kOffset is the greater of the two. Such
    // scores are equal, or so far apart that the greatest takes all the weight: only their order counts, and that the line
    // can be followed back (`Score::natural`).
    FASTATTN_INLINE Vec joined() const {
        return select(natural == splat(-kInfinity), natural, max(natural * 0.5f - kOffset, base_two));
    }

    static constexpr float kOffset = 0x1.ep126f;
};

// A term's factor in units of log 2; finite where it is, since infinity times zero would be no number.
FASTATTN_INLINE float base_two_factor(float natural) {
    const double factor = double{natural} * 1.4426950408889634;
    if (factor > kLargest && natural <= kLargest) return kLargest;
    if (factor < kLowest && natural >= kLowest) return kLowest;
    return static_cast<float>(factor);
}

}  // namespace detail

class Score {
  public:
    explicit Score(const AttentionScore& args)
        : args_(args),
          dropout_(args.dropout_p, args.seed),
          plain_(!args.mask.present() && !args.alibi_slopes.present() && args.softcap == 0.0f && args.scale > 0.0f),
          factor_(detail::base_two_factor(args.scale)),
          softcap_factor_(detail::base_two_factor(args.softcap)) {}

    // Whether a score is factor() * x, and factor() > 0.
    bool plain() const { return plain_; }
    float factor() const { return factor_; }
    // The score that is `base_two` in these units.
    double natural(float base_two) const {
        const double near = base_two * 0.6931471805599453, far = 2.0 * (double{base_two} + detail::TwoUnits::kOffset);
        if (plain_ || near < far) return near;
        return far > kLowest ? far : kLowest;  // the lowest float was rounded on its way
    }
    bool drops() const { return args_.dropout_p > 0.0; }
    float drop_scale() const { return dropout_.scale(); }

    // Scores of query i and keys j0 … j0 + count - 1. Reads and writes whole vectors of `row`. Into `slopes`, unless
    // null, goes the soft cap's derivative, 1 - tanh^2. kNatural: scores as they are, not in units of log 2.
    template <bool kNatural = false>
    void score_row(const Sequence& seq, int64_t b, int64_t h, int64_t i, int64_t j0, int64_t count, float* row,
                   float* slopes = nullptr) const {
        const Tensor& m = args_.mask;
        if (!m.present())
            return score_with<kNatural>(seq, b, h, i, j0, count, static_cast<const float*>(nullptr), 0, row, slopes);
        auto with = [&](auto* data) {
            const int64_t stride = m.size[3] == 1 ? 0 : m.stride[3];
            score_with<kNatural>(seq, b, h, i, j0, count, data + mask_offset(b, h, i) + j0 * stride, stride, row,
                                 slopes);
        };
        if (m.dtype == DType::kBool) {
            with(m.as<const uint8_t>());
        } else if (m.dtype == DType::kFloat32) {
            with(m.as<const float>());
        } else if (m.dtype == DType::kBFloat16) {
            with(m.as<const BFloat16>());
        } else {
            with(m.as<const Half>());
        }
    }

    // Sets the scores of keys outside of `range` to -inf: row[0] is key j0, `columns` of them.
    static void exclude(KeyRange range, int64_t j0, int64_t columns, float* row) {
        const int64_t begin = smaller(range.begin - j0, columns), end = larger(range.end - j0, 0);
        for (int64_t c = 0; c < begin; ++c) row[c] = -kInfinity;
        for (int64_t c = end; c < columns; ++c) row[c] = -kInfinity;
    }

    // Whether a bool mask excludes every key j0 … j0 + count - 1 from queries i0 … i0 + rows - 1.
    bool all_off(int64_t b, int64_t h, int64_t i0, int64_t rows, int64_t j0, int64_t count) const {
        const Tensor& m = args_.mask;
        if (m.dtype != DType::kBool) return false;
        if (m.size[2] == 1) rows = 1;
        if (m.size[3] == 1) count = 1, j0 = 0;
        for (int64_t r = 0; r < rows; ++r) {
            const uint8_t* row = m.as<const uint8_t>() + mask_offset(b, h, i0 + r) + j0 * m.stride[3];
            for (int64_t c = 0; c < count; ++c) {
                if (row[c * m.stride[3]]) return false;
            }
        }
        return true;
    }

    // Dropout on the weights (softmax.h) of query i and keys j0 … j0 + count - 1. `total_q` is the packed query's length.
    void drop_row(const Sequence& seq, int64_t total_q, int64_t b, int64_t h, int64_t i, int64_t j0, int64_t count,
                  float* row) const {
        const RowKey key = dropout_.row(dropout_row(args_, seq, total_q, b, h, i));
        for (int64_t c = 0; c < count; c += kLanes) {
            const KeepVec keep = dropout_.keep_columns(key, static_cast<uint32_t>(seq.padded_before + j0 + c));
            store(row + c, select(keep, load(row + c) * dropout_.scale(), splat(kNoWeight)));
        }
    }

  private:
    int64_t mask_offset(int64_t b, int64_t h, int64_t i) const {
        const Tensor& m = args_.mask;
        return (m.size[0] == 1 ? 0 : b * m.stride[0]) + (m.size[1] == 1 ? 0 : h * m.stride[1]) +
               (m.size[2] == 1 ? 0 : i * m.stride[2]);
    }

    template <bool kNatural, class M>
    void score_with(const Sequence& seq, int64_t b, int64_t h, int64_t i, int64_t j0, int64_t count, const M* mask,
                    int64_t stride, float* row, float* slopes) const {
        float slope = 0.0f;
        if (args_.alibi_slopes.present()) {
            const Tensor& t = args_.alibi_slopes;
            slope = t.as<float>()[t.rank == 2 ? b * t.stride[0] + h * t.stride[1] : h * t.stride[0]];
        }
        const float slope_factor = detail::base_two_factor(slope);
        const int32_t position = static_cast<int32_t>(i + seq.diagonal - j0);
        for (int64_t c = 0; c < count; c += kLanes) {
            const Vec x = load(row + c);
            detail::TwoUnits s{x * args_.scale, x * factor_};
            if (args_.softcap > 0.0f) {
                const Vec capped = tanh(s.natural / args_.softcap);
                if (slopes) store(slopes + c, 1.0f - capped * capped);
                s = {args_.softcap * capped, softcap_factor_ * capped};
            }
            if (args_.alibi_slopes.present()) {
                const Vec distance =
                    abs(__builtin_convertvector(lane_numbers(static_cast<int32_t>(c)) - position, Vec));
                s.natural -= slope * distance;
                s.base_two -= slope_factor * distance;
            }
            if (mask) s.mask(detail::mask_vector(mask, stride, c, smaller(kLanes, count - c)));
            store(row + c, kNatural ? s.natural : s.joined());
        }
    }

    const AttentionScore& args_;
    Dropout dropout_;
    bool plain_;
    float factor_, softcap_factor_;
};

}  // namespace fastattn::FASTATTN_ISA
