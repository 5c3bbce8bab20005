// Attention of a few new queries to a key-value cache, contiguous or paged, with the new tokens appended on the way:
//
//     s = scale * query . key;   s = softcap * tanh(s / softcap);   s -= slope * |i + diagonal - j|;   -inf outside the window
//     out = softmax(s) . value,   lse = logsumexp(s),   diagonal = keys - queries of each sequence
//
// A block has one sequence, one key head and a part of the keys that its queries see; the heads that share the key head,
// and their queries, are its rows, at most kMostRows. A group of lanes has a key at a time, a lane 16 bytes of its row (in
// float32 beyond 128 columns twice 16), and as much of the query and of the output of every row:
//
//     group 0  | key 0 | key G   | …      G groups a block, kAhead of a group's keys and values asked for at once;
//     group 1  | key 1 | key G+1 |        a score is a sum over the group's lanes, the softmax goes on in each group
//     …                                   for itself, and at the end the groups' outputs are weighed and summed.
//
// Must move: each sequence's keys and values once. A lane does 4 operations a row for each element it loads, so with up to
// four rows memory bounds it; many rows are for matrix units, which the Triton kernel uses. The parts' outputs, float32,
// are joined by a second kernel, always in the parts' order: the bits depend on shapes and lengths alone.
//
// New tokens are read where they come from, not from the cache that the same launch writes: no block waits for another.
// Given angles, queries are turned as they are loaded, x * cos + rotate(x) * sin as in rotary_embedding, and new keys on
// their way to the cache; each block then appends the tokens of its own part before it begins, and reads them there. A page
// that the table names and the cache does not have is neither read nor written, its keys are not seen.
#include <math.h>

#include <initializer_list>

#include "decode.h"
#include "device.h"

namespace fastattn::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kMostRows = 8;
constexpr int kMostDim = 256;
constexpr int kMostParts = kThreads;  // combine has a thread for each
constexpr int kFewestKeys = 64;       // of a part: fewer are not worth its sum
constexpr int kBlocksAtOnce = 2;      // on a multiprocessor

// Where a token lies: in a block of the cache, or among those that are appended.
struct Place {
    int64_t block, token;
    bool added, there;
};

__device__ inline float angle(const AngleAddress& from, int64_t batch, int64_t token, int column) {
    const int64_t at = batch * from.stride_batch + token * from.stride_token + column;
    if (from.dtype == DType::kFloat32) return static_cast<const float*>(from.values)[at];
    if (from.dtype == DType::kBFloat16) return to_float(static_cast<const BFloat16*>(from.values)[at]);
    return to_float(static_cast<const Half*>(from.values)[at]);
}

// What the angles of a new token make of x, which is element `column` of its row.
template <class T>
__device__ float turned(const Turn& turn, int64_t batch, int64_t token, const T* row, int column, float x) {
    const int dim = static_cast<int>(turn.dim), half = dim / 2;
    if (column >= dim) return x;
    const bool second = turn.interleaved ? column % 2 == 1 : column >= half;
    const int distance = turn.interleaved ? 1 : half;
    const float partner = to_float(row[second ? column - distance : column + distance]);
    return x * angle(turn.cos, batch, token, column) +
           (second ? partner : -partner) * angle(turn.sin, batch, token, column);
}

// A sequence's share of the arguments.
struct Sequence {
    int64_t batch, kv_head;
    int before, length;    // keys, without the appended ones and with them
    int in_cache_before;   // keys that are read from the cache
    const int32_t* table;  // of the sequence, or null
    int page_size, pages;

    __device__ Sequence(const Decode& a, int64_t batch, int64_t kv_head)
        : batch(batch),
          kv_head(kv_head),
          before(a.cache_seqlens[batch]),
          table(a.block_table ? a.block_table + batch * a.stride_table_batch : nullptr),
          page_size(static_cast<int>(a.page_size)),
          pages(static_cast<int>(a.pages)) {
        const int64_t all = before + a.added;
        length = static_cast<int>(all < 0 ? 0 : all < a.capacity ? all : a.capacity);
        in_cache_before = a.turn.dim > 0 ? length : before;
    }

    __device__ Place in_cache(int position) const {
        if (!table) return {batch, position, false, true};
        const int page = table[position / page_size];
        return {page, position % page_size, false, page >= 0 && page < pages};
    }

    __device__ Place find(int position) const {
        return position < in_cache_before ? in_cache(position) : Place{0, int64_t{position} - before, true, true};
    }

    template <class T>
    __device__ const T* row(const CacheAddress& from, const Place& place) const {
        if (!place.added) return cache_row<T>(from, place);
        return static_cast<const T*>(from.added) + batch * from.stride_added_batch + kv_head * from.stride_added_head +
               place.token * from.stride_added_token;
    }

    template <class T>
    __device__ T* cache_row(const CacheAddress& from, const Place& place) const {
        return static_cast<T*>(from.rows) + place.block * from.stride_block + kv_head * from.stride_head +
               place.token * from.stride_token;
    }

    // `turn` may be null.
    template <class T>
    __device__ void copy(const CacheAddress& x, const Place& from, const Place& to, const Turn* turn) const {
        const T* source = row<T>(x, from);
        T* target = cache_row<T>(x, to);
        for (int c = threadIdx.x; c < x.dim; c += kThreads) {
            if (turn && c < turn->dim) {
                from_float(turned(*turn, batch, from.token, source, c, to_float(source[c])), target[c]);
            } else {
                target[c] = source[c];
            }
        }
    }

    // Writes the tokens first, first + step, … below end of those to be appended into the cache, as far as it holds them.
    template <class T>
    __device__ void append(const Decode& a, int64_t first, int64_t end, int64_t step) const {
        for (int64_t token = first; token < end; token += step) {
            const int64_t position = before + token;
            if (position < 0 || position >= a.capacity) continue;
            const Place to = in_cache(static_cast<int>(position)), from{0, token, true, true};
            if (!to.there) continue;
            copy<T>(a.key, from, to, &a.turn);
            copy<T>(a.value, from, to, nullptr);
        }
    }
};

template <class T, int kRows, int kLanes, int kVectors, bool kAligned>
__global__ void __launch_bounds__(kThreads) attend(Decode a) {
    constexpr int kSize = Vector<T>::kSize, kGroups = kThreads / kLanes, kColumns = kLanes * kVectors * kSize;
    constexpr int kAhead = kRows == kMostRows ? 2 : 4;  // as the registers allow
    __shared__ float group_top[kGroups][kRows], group_total[kGroups][kRows], group_out[kGroups][kRows][kColumns];
    const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes;
    const int64_t part = blockIdx.x % a.parts, pair = blockIdx.x / a.parts;
    const Sequence sequence(a, pair / a.kv_heads, pair % a.kv_heads);

    // Rows, and the keys that each of them sees: first … last - 1.
    const int heads_of_key = static_cast<int>(a.heads / a.kv_heads), queries = static_cast<int>(a.queries);
    const int rows = heads_of_key * queries, diagonal = sequence.length - queries;
    const int left = static_cast<int>(a.window_left), right = static_cast<int>(a.window_right);
    auto first = [&](int i) { return left < 0 ? 0 : max(i + diagonal - left, 0); };
    auto last = [&](int i) { return right < 0 ? sequence.length : min(i + diagonal + right + 1, sequence.length); };
    const int low = first(0), in_part = (max(last(queries - 1) - low, 0) + static_cast<int>(a.parts) - 1) / a.parts;
    const int begin = low + static_cast<int>(part) * in_part, end = min(begin + in_part, last(queries - 1));
    if (a.turn.dim > 0) {
        // There are as many queries as new tokens, so that each of these is in some part, whatever the window.
        const int64_t before = sequence.before;
        sequence.append<T>(a, begin > before ? begin - before : 0, end - before, 1);
        __syncthreads();
    } else {
        sequence.append<T>(a, part, a.added, a.parts);
    }

    float query[kRows][kVectors][kSize], slope[kRows], top[kRows], total[kRows] = {};
    float out[kRows][kVectors][kSize] = {};
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        const int64_t head = sequence.kv_head * heads_of_key + r % heads_of_key, i = r / heads_of_key;
        const T* from = static_cast<const T*>(a.query) + sequence.batch * a.stride_query_batch +
                        head * a.stride_query_head + i * a.stride_query_token;
        for (int v = 0; v < kVectors; ++v) {
            // A row that is not there has no columns, and is nowhere stored.
            const int column = (v * kLanes + lane) * kSize;
            load<T, kAligned>(from, column, r < rows ? a.key.dim : 0, query[r][v]);
            for (int e = 0; e < kSize && r < rows; ++e) {
                query[r][v][e] = turned(a.turn, sequence.batch, i, from, column + e, query[r][v][e]);
            }
        }
        slope[r] = a.slopes && r < rows ? a.slopes[sequence.batch * a.stride_slopes_batch + head] : 0.0f;
        top[r] = -INFINITY;
    }

    for (int start = begin; start < end; start += kGroups * kAhead) {  // as often in all groups: they share shuffles
        Vector<T> key[kAhead][kVectors], value[kAhead][kVectors];
        bool there[kAhead];
#pragma unroll
        for (int u = 0; u < kAhead; ++u) {
            const int j = start + u * kGroups + group;
            const Place place = j < end ? sequence.find(j) : Place{0, 0, false, false};
            there[u] = place.there;
            const T *key_row = sequence.row<T>(a.key, place), *value_row = sequence.row<T>(a.value, place);
            for (int v = 0; v < kVectors; ++v) {
                const int column = (v * kLanes + lane) * kSize;
                key[u][v] = load<T, kAligned>(key_row, column, there[u] ? a.key.dim : 0);
                value[u][v] = load<T, kAligned>(value_row, column, there[u] ? a.value.dim : 0);
            }
        }

        float score[kAhead][kRows];
#pragma unroll
        for (int u = 0; u < kAhead; ++u) {
            const int j = start + u * kGroups + group;
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                float sum = 0.0f;
                for (int v = 0; v < kVectors; ++v) {
                    for (int i = 0; i < kSize; ++i) sum += query[r][v][i] * to_float(key[u][v].element[i]);
                }
                float s = sum_of_lanes<kLanes>(sum) * a.scale;
                if (a.softcap > 0.0f) s = a.softcap * tanhf(s / a.softcap);
                const int i = r / heads_of_key;
                if (a.slopes) s -= slope[r] * static_cast<float>(abs(i + diagonal - j));
                score[u][r] = there[u] && j >= first(i) && j < last(i) ? s : -INFINITY;
            }
        }

#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            float highest = top[r];
#pragma unroll
            for (int u = 0; u < kAhead; ++u) highest = fmaxf(highest, score[u][r]);
            const float base = highest == -INFINITY ? 0.0f : highest, shrink = expf(top[r] - base);
            top[r] = highest;
            total[r] *= shrink;
            for (int v = 0; v < kVectors; ++v) {
                for (int i = 0; i < kSize; ++i) out[r][v][i] *= shrink;
            }
#pragma unroll
            for (int u = 0; u < kAhead; ++u) {
                // A key at -inf has no weight, even in a row that holds NaN.
                const float weight = score[u][r] == -INFINITY ? 0.0f : expf(score[u][r] - base);
                total[r] += weight;
                for (int v = 0; v < kVectors; ++v) {
                    for (int i = 0; i < kSize; ++i) out[r][v][i] += weight * to_float(value[u][v].element[i]);
                }
            }
        }
    }

#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        if (lane == 0) group_top[group][r] = top[r];
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        float highest = -INFINITY;
        for (int g = 0; g < kGroups; ++g) highest = fmaxf(highest, group_top[g][r]);
        const float shrink = expf(top[r] - (highest == -INFINITY ? 0.0f : highest));
        if (lane == 0) group_total[group][r] = total[r] * shrink;
        for (int v = 0; v < kVectors; ++v) {
            for (int i = 0; i < kSize; ++i)
                group_out[group][r][(v * kLanes + lane) * kSize + i] = out[r][v][i] * shrink;
        }
    }
    __syncthreads();

    const int dim = static_cast<int>(a.value.dim);
    for (int at = threadIdx.x; at < rows * dim; at += kThreads) {
        const int r = at / dim, column = at % dim, i = r / heads_of_key;
        const int64_t head = sequence.kv_head * heads_of_key + r % heads_of_key;
        float highest = -INFINITY, sum = 0.0f, weighted = 0.0f;
        for (int g = 0; g < kGroups; ++g) {
            highest = fmaxf(highest, group_top[g][r]);
            sum += group_total[g][r];
            weighted += group_out[g][r][column];
        }
        const bool none = sum == 0.0f;
        if (!none) weighted /= sum;
        const float lse = none ? -INFINITY : highest + logf(sum);
        const int64_t row = (sequence.batch * queries + i) * a.heads + head;
        if (a.parts > 1) {
            const int64_t partial_row = part * a.batch * queries * a.heads + row;
            a.partial_out[partial_row * dim + column] = weighted;
            if (column == 0) a.partial_lse[partial_row] = lse;
        } else {
            from_float(weighted, static_cast<T*>(a.out)[row * dim + column]);
            if (column == 0) a.lse[(sequence.batch * a.heads + head) * queries + i] = lse;
        }
    }
}

// out = sum over parts of exp(lse_p - top) out_p / sum over parts of exp(lse_p - top); a block for each row.
template <class T>
__global__ void __launch_bounds__(kThreads) combine(Decode a) {
    __shared__ float part_lse[kMostParts], weight[kMostParts];
    const int64_t row = blockIdx.x, rows = a.batch * a.queries * a.heads, dim = a.value.dim;
    const int parts = static_cast<int>(a.parts), thread = threadIdx.x;
    const float own = thread < parts ? a.partial_lse[thread * rows + row] : -INFINITY;
    part_lse[thread] = own;
    __syncthreads();
    float top = -INFINITY;
    for (int p = 0; p < parts; ++p) top = fmaxf(top, part_lse[p]);
    weight[thread] = own == -INFINITY ? 0.0f : expf(own - (top == -INFINITY ? 0.0f : top));
    __syncthreads();
    float total = 0.0f;
    for (int p = 0; p < parts; ++p) total += weight[p];
    const bool none = total == 0.0f;

    for (int64_t column = thread; column < dim; column += kThreads) {
        float weighted = 0.0f;
        for (int p = 0; p < parts; ++p) weighted += weight[p] * a.partial_out[(p * rows + row) * dim + column];
        from_float(none ? 0.0f : weighted / total, static_cast<T*>(a.out)[row * dim + column]);
    }
    if (thread == 0) {
        const int64_t token = row / a.heads, head = row % a.heads;
        const int64_t place = (token / a.queries * a.heads + head) * a.queries + token % a.queries;
        a.lse[place] = none ? -INFINITY : (top == -INFINITY ? 0.0f : top) + logf(total);
    }
}

bool rows_aligned(const Decode& a) {
    const int64_t size = size_of(a.dtype);
    auto whole = [&](std::initializer_list<int64_t> counts) {
        for (int64_t count : counts) {
            if (count * size % 16 != 0) return false;
        }
        return true;
    };
    auto cache = [&](const CacheAddress& x) {
        return aligned(x.rows) && aligned(x.added) &&
               whole({x.dim, x.stride_block, x.stride_head, x.stride_token, x.stride_added_batch, x.stride_added_head,
                      x.stride_added_token});
    };
    return aligned(a.query) && whole({a.stride_query_batch, a.stride_query_head, a.stride_query_token}) &&
           cache(a.key) && cache(a.value);
}

// Calls body(rows, lanes, vectors, aligned) with Constants. Rows that are not aligned have one variant, for all sizes.
template <class T, class Body>
void with_variant(const Decode& a, const Body& body) {
    constexpr int kSize = Vector<T>::kSize, kMostVectors = kMostDim / kSize / kWarp;
    if (!rows_aligned(a)) {
        return body(Constant<kMostRows>{}, Constant<kWarp>{}, Constant<kMostVectors>{}, Constant<false>{});
    }
    auto with_lanes = [&](auto rows) {
        const int64_t vectors = ((a.key.dim > a.value.dim ? a.key.dim : a.value.dim) + kSize - 1) / kSize;
        if (vectors <= 8) return body(rows, Constant<8>{}, Constant<1>{}, Constant<true>{});
        if (vectors <= 16) return body(rows, Constant<16>{}, Constant<1>{}, Constant<true>{});
        if constexpr (kMostVectors > 1) {
            if (vectors > kWarp) return body(rows, Constant<kWarp>{}, Constant<kMostVectors>{}, Constant<true>{});
        }
        body(rows, Constant<kWarp>{}, Constant<1>{}, Constant<true>{});
    };
    const int64_t rows = a.heads / a.kv_heads * a.queries;
    if (rows == 1) return with_lanes(Constant<1>{});
    if (rows <= 4) return with_lanes(Constant<4>{});
    with_lanes(Constant<kMostRows>{});
}

template <class T>
void decode_as(const Decode& a) {
    with_variant<T>(a, [&](auto rows, auto lanes, auto vectors, auto all_aligned) {
        launch(attend<T, rows.value, lanes.value, vectors.value, all_aligned.value>, a.batch * a.kv_heads * a.parts,
               kThreads, a.stream, a);
    });
    if (a.parts > 1) launch(combine<T>, a.batch * a.queries * a.heads, kThreads, a.stream, a);
}

}  // namespace

int64_t decode_most_rows() { return kMostRows; }
int64_t decode_most_dim() { return kMostDim; }

int64_t decode_parts(int64_t sequences, int64_t capacity, int64_t multiprocessors) {
    int64_t parts = sequences > 0 ? kBlocksAtOnce * multiprocessors / sequences : 1;
    for (int64_t most : {capacity / kFewestKeys, int64_t{kMostParts}}) parts = parts < most ? parts : most;
    return parts > 1 ? parts : 1;
}

void decode(const Decode& a) {
    if (a.dtype == DType::kFloat32) return decode_as<float>(a);
    if (a.dtype == DType::kBFloat16) return decode_as<BFloat16>(a);
    decode_as<Half>(a);
}

}  // namespace fastattn::cuda
