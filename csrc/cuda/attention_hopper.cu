// Attention's forward for Hopper: softmax(scale · query · keyᵀ) · value, dense, causal or in a window, and its lse.
//
//     block   128 queries of one head: a warpgroup that loads, two that compute 64 queries each
//
//     loads   query | key 0 | value 0 | key 1 | value 1 | …       by the copy engine, two keys' and two values' tiles of
//                                                                 128 keys in flight; barriers say full and empty
//     computes        S0  softmax0 | S1      softmax1 | S2 …      S: scores (64, 128), in registers, by the matrix unit
//                                  | P0 V0            | P1 V1     beside the next scores: product and softmax overlap
//
// The two warpgroups take turns at the matrix unit: while one has it, the other has its exponentials (named barriers 1 and 2).
// Key tiles are visited from the last to the first, those that no query of the block sees not at all; only tiles that the
// window's edge or the end of the keys crosses are masked. Blocks with the most keys start first, and heads go in sections
// whose keys and values fit in the second-level cache.
//
// Floor: 4 dim operations for each query and key that it sees, at 4096 a cycle and multiprocessor; and one exponential, at
// 16 a cycle: half as long as the products with dim 128, as long with 64. Weights are rounded to 16 bits for their product,
// sums are float32.
//
// Source: Shah et al., 2024 (FlashAttention-3).
#include <math.h>

#include "attention.h"
#include "hopper.h"

namespace fastattn::cuda {
namespace {

constexpr int kConsumers = 2;
constexpr int kRows = 64;  // queries of a warpgroup
constexpr int kQueries = kConsumers * kRows;
constexpr int kKeys = 128;
constexpr int kStages = 2;
constexpr int kBothGroups = kConsumers * kWarpgroup;
constexpr int kThreads = kWarpgroup * (1 + kConsumers);
constexpr int kPanel = 64;  // elements of a row of a tile

template <class T, int kRowsOfTile, int kDim>
struct Tile {
    T panel[kDim / kPanel][kRowsOfTile][kPanel];
};

template <class T, int kDim>
struct Shared {
    Tile<T, kQueries, kDim> query;
    Tile<T, kKeys, kDim> key[kStages], value[kStages];
    Barrier query_full, key_full[kStages], key_empty[kStages], value_full[kStages], value_empty[kStages];
};

struct Arguments {
    TensorMap query, key, value;
    void* out;
    float* lse;
    int heads, heads_of_key, q_len, k_len, tiles, pairs, section;  // pairs: of batch and head
    int left, right, diagonal;
    float scale_log2;  // the scale times log2(e)
};

// Which queries of which head a block has, and the key tiles they see: first … first + count - 1.
struct Work {
    int batch, head, first_query, first_tile, count;

    __device__ Work(const Arguments& a, int block) {
        const int section = block / (a.section * a.tiles), rest = block % (a.section * a.tiles);
        const int pairs = min(a.section, a.pairs - section * a.section);
        const int pair = section * a.section + rest % pairs;
        batch = pair / a.heads;
        head = pair % a.heads;
        first_query = (a.tiles - 1 - rest / pairs) * kQueries;
        const int last_query = min(first_query + kQueries, a.q_len) - 1;
        const int low = a.left < 0 ? 0 : max(first_query + a.diagonal - a.left, 0);
        const int high = a.right < 0 ? a.k_len : min(last_query + a.diagonal + a.right + 1, a.k_len);
        first_tile = low / kKeys;
        count = max((high + kKeys - 1) / kKeys - first_tile, 0);
        if (high <= low) count = 0;
    }

    // The tile that is visited as number n.
    __device__ int tile(int n) const { return first_tile + count - 1 - n; }
};

// The stage that has tile n, and the parity of the phase in which its barrier says full.
__device__ inline int stage_of(int n) { return n % kStages; }
__device__ inline int parity_of(int n) { return n / kStages % 2; }

template <class T, int kRowsOfTile, int kDim>
__device__ void load_tile(const TensorMap& map, Barrier& full, Tile<T, kRowsOfTile, kDim>& to, int row, int head,
                          int batch) {
    full.arrive_and_expect(static_cast<int>(sizeof(to)));
    for (int p = 0; p < kDim / kPanel; ++p) load_box(map, full, to.panel[p], p * kPanel, row, head, batch);
}

// What one thread of the first warpgroup does.
template <class T, int kDim>
__device__ void load_all(const Arguments& a, Shared<T, kDim>& shared, const Work& work) {
    const int key_head = work.head / a.heads_of_key;
    load_tile(a.query, shared.query_full, shared.query, work.first_query, work.head, work.batch);
    for (int n = 0; n < work.count; ++n) {
        const int stage = stage_of(n), row = work.tile(n) * kKeys;
        shared.key_empty[stage].wait(parity_of(n) ^ 1);
        load_tile(a.key, shared.key_full[stage], shared.key[stage], row, key_head, work.batch);
        shared.value_empty[stage].wait(parity_of(n) ^ 1);
        load_tile(a.value, shared.value_full[stage], shared.value[stage], row, key_head, work.batch);
    }
}

// The scores of the thread: of rows `row` and row + 8, element 4 j + 2 h + e of row + 8 h and key 8 j + 2 (lane % 4) + e.
constexpr int kScores = kRows * kKeys / kWarpgroup;

// scores = query · keyᵀ, begun.
template <class T, int kDim>
__device__ void begin_scores(float (&scores)[kScores], const Tile<T, kQueries, kDim>& query, int first_row,
                             const Tile<T, kKeys, kDim>& key) {
    constexpr int kAlong = 16;  // panels lie along the depth: the distance is not asked for
    matrix_fence();
    for (int step = 0; step < kDim / 16; ++step) {
        const int panel = step * 16 / kPanel, column = step * 16 % kPanel;
        multiply_scores<T>(scores, describe_tile(shared_address(&query.panel[panel][first_row][column]), kAlong),
                           describe_tile(shared_address(&key.panel[panel][0][column]), kAlong), step > 0);
    }
    matrix_commit();
}

// out += weights · value, begun.
template <class T, int kDim>
__device__ void begin_values(float (&out)[kDim / 2], const uint32_t (&weights)[kKeys / 16][4],
                             const Tile<T, kKeys, kDim>& value) {
    matrix_fence();
    for (int step = 0; step < kKeys / 16; ++step) {
        const uint32_t rows = shared_address(&value.panel[0][step * 16][0]);
        multiply_values<T>(out, weights[step], describe_tile(rows, static_cast<int>(sizeof(value.panel[0]))));
    }
    matrix_commit();
}

// Takes away what the thread's rows do not see of this key tile.
__device__ inline void mask(const Arguments& a, float (&scores)[kScores], int row, int tile, int lane) {
    for (int i = 0; i < kScores; ++i) {
        const int key = tile * kKeys + i / 4 * 8 + lane % 4 * 2 + i % 2, middle = row + i / 2 % 2 * 8 + a.diagonal;
        const bool seen =
            key < a.k_len && (a.right < 0 || key <= middle + a.right) && (a.left < 0 || key >= middle - a.left);
        if (!seen) scores[i] = -INFINITY;
    }
}

// Whether that takes anything from any of the warpgroup's rows.
__device__ inline bool crosses_an_edge(const Arguments& a, int first_row, int tile) {
    const int begin = tile * kKeys, end = begin + kKeys, middle = first_row + a.diagonal;
    return end > a.k_len || (a.right >= 0 && end - 1 > middle + a.right) ||
           (a.left >= 0 && begin < middle + kRows - 1 - a.left);
}

// The running softmax of a thread's two rows. total has the thread's own keys.
struct Softmax {
    float top[2] = {-INFINITY, -INFINITY}, total[2] = {}, shrink[2];

    static __device__ float base_of(float top, float scale_log2) { return top == -INFINITY ? 0.0f : top * scale_log2; }

    // Scores to weights; `shrink` is for what was summed before.
    __device__ void update(float (&scores)[kScores], float scale_log2) {
        for (int h = 0; h < 2; ++h) {
            float highest = top[h];
            for (int i = 2 * h; i < kScores; i += 4) highest = fmaxf(highest, fmaxf(scores[i], scores[i + 1]));
            for (int distance : {1, 2}) highest = fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, distance));
            const float base = base_of(highest, scale_log2);
            shrink[h] = exp2_fast(top[h] * scale_log2 - base);
            top[h] = highest;
            float sum = 0.0f;
            for (int i = 2 * h; i < kScores; i += 4) {
                for (int e = 0; e < 2; ++e) {
                    scores[i + e] = exp2_fast(scores[i + e] * scale_log2 - base);
                    sum += scores[i + e];
                }
            }
            total[h] = total[h] * shrink[h] + sum;
        }
    }
};

// The thread's weights as the matrix unit takes its first operand: its sums' layout already is that operand's.
template <class T>
__device__ void round_weights(const float (&scores)[kScores], uint32_t (&weights)[kKeys / 16][4]) {
    for (int step = 0; step < kKeys / 16; ++step) {
        for (int i = 0; i < 4; ++i)
            weights[step][i] = pair_of<T>(scores[8 * step + 2 * i], scores[8 * step + 2 * i + 1]);
    }
}

// Writes the warp's 16 rows, by way of the query's place in shared memory so that neighbours write neighbouring memory.
template <class T, int kDim>
__device__ void store_rows(const Arguments& a, const Work& work, Tile<T, kQueries, kDim>& place, int first_row,
                           const float (&out)[kDim / 2], const float (&factor)[2]) {
    const int lane = threadIdx.x % kWarp;
    constexpr int kPieces = kPanel / 8;  // of 16 bytes in a row of a panel
    auto piece_of = [&](int row, int panel, int piece) {
        T(&line)[kPanel] = place.panel[panel][first_row + row];
        return reinterpret_cast<uint32_t*>(line) + (piece ^ row % 8) * 4;
    };
    for (int i = 0; i < kDim / 2; i += 2) {
        const int h = i / 2 % 2, piece = i / 4;
        const uint32_t pair = pair_of<T>(out[i] * factor[h], out[i + 1] * factor[h]);
        piece_of(lane / 4 + 8 * h, piece / kPieces, piece % kPieces)[lane % 4] = pair;
    }
    __syncwarp();
    for (int at = lane; at < 16 * kDim / 8; at += kWarp) {
        const int row = at / (kDim / 8), piece = at % (kDim / 8), query = work.first_query + first_row + row;
        if (query >= a.q_len) continue;
        T* to =
            static_cast<T*>(a.out) + ((int64_t{work.batch} * a.q_len + query) * a.heads + work.head) * kDim + piece * 8;
        *reinterpret_cast<Vector<T>*>(to) =
            *reinterpret_cast<const Vector<T>*>(piece_of(row, piece / kPieces, piece % kPieces));
    }
}

// What a computing warpgroup does.
template <class T, int kDim>
__device__ void compute(const Arguments& a, Shared<T, kDim>& shared, const Work& work, int consumer) {
    const int thread = threadIdx.x % kWarpgroup, lane = thread % kWarp, warp = thread / kWarp;
    const int first_row = consumer * kRows, row = work.first_query + first_row + warp * 16 + lane / 4;
    const int own_turn = 1 + consumer, other_turn = 2 - consumer, own_rows = 3 + consumer;  // named barriers
    float scores[kScores], out[kDim / 2] = {};
    uint32_t weights[kKeys / 16][4];
    Softmax softmax;

    auto finish = [&](Barrier& empty) {  // the warp has read this tile
        if (lane == 0) empty.arrive();
    };
    auto soften = [&](int n) {
        const int tile = work.tile(n);
        if (crosses_an_edge(a, work.first_query + first_row, tile)) mask(a, scores, row, tile, lane);
        softmax.update(scores, a.scale_log2);
    };

    if (work.count > 0) {
        shared.query_full.wait(0);
        shared.key_full[0].wait(0);
        begin_scores(scores, shared.query, first_row, shared.key[0]);
        matrix_wait<0>();
        pin(scores);
        finish(shared.key_empty[0]);
        if (consumer == 1 && work.count > 1) named_arrive(other_turn, kBothGroups);  // the first turn is the other's
        soften(0);
        round_weights<T>(scores, weights);

        for (int n = 1; n < work.count; ++n) {
            const int stage = stage_of(n), before = stage_of(n - 1);
            named_sync(own_turn, kBothGroups);
            shared.key_full[stage].wait(parity_of(n));
            pin(scores);
            begin_scores(scores, shared.query, first_row, shared.key[stage]);
            shared.value_full[before].wait(parity_of(n - 1));
            pin(out);
            begin_values(out, weights, shared.value[before]);
            // The last turn of all is nobody's.
            if (consumer == 0 || n + 1 < work.count) named_arrive(other_turn, kBothGroups);
            matrix_wait<1>();
            pin(scores);
            finish(shared.key_empty[stage]);
            soften(n);
            matrix_wait<0>();
            pin(out);
            finish(shared.value_empty[before]);
            for (int i = 0; i < kDim / 2; ++i) out[i] *= softmax.shrink[i / 2 % 2];
            round_weights<T>(scores, weights);
        }

        const int last = stage_of(work.count - 1);
        shared.value_full[last].wait(parity_of(work.count - 1));
        pin(out);
        begin_values(out, weights, shared.value[last]);
        matrix_wait<0>();
        pin(out);
    }

    float factor[2];
    for (int h = 0; h < 2; ++h) {
        const float total = sum_of_lanes<4>(softmax.total[h]);
        factor[h] = total == 0.0f ? 0.0f : 1.0f / total;
        const int query = row + 8 * h;
        if (lane % 4 == 0 && query < a.q_len) {
            constexpr float kLn2 = 0.6931471805599453f;
            const float base = Softmax::base_of(softmax.top[h], a.scale_log2);
            a.lse[(int64_t{work.batch} * a.heads + work.head) * a.q_len + query] =
                total == 0.0f ? -INFINITY : base * kLn2 + logf(total);
        }
    }
    named_sync(own_rows, kWarpgroup);  // all four warps have read the query
    store_rows(a, work, shared.query, first_row + warp * 16, out, factor);
}

template <class T, int kDim>
__global__ void __launch_bounds__(kThreads, 1) attend_hopper(const __grid_constant__ Arguments a) {
#ifdef FASTATTN_HOPPER_CODE
    Shared<T, kDim>& shared = *reinterpret_cast<Shared<T, kDim>*>(dynamic_shared());
    const Work work(a, blockIdx.x);
    if (threadIdx.x == 0) {
        shared.query_full.init(1);
        for (int stage = 0; stage < kStages; ++stage) {
            shared.key_full[stage].init(1);
            shared.value_full[stage].init(1);
            shared.key_empty[stage].init(kBothGroups / kWarp);
            shared.value_empty[stage].init(kBothGroups / kWarp);
        }
        publish_barriers();
    }
    __syncthreads();
    if (threadIdx.x < kWarpgroup) {
        give_up_registers<40>();
        if (threadIdx.x == 0 && work.count > 0) load_all(a, shared, work);
    } else {
        take_registers<232>();
        compute(a, shared, work, threadIdx.x / kWarpgroup - 1);
    }
#endif
}

TensorMap map_of(DType dtype, int64_t batch, int64_t dim, const AttentionOperand& x, int rows) {
    auto size = [](int64_t n) { return static_cast<uint64_t>(n); };
    auto bytes = [](int64_t n, int64_t stride) { return n == 1 ? uint64_t{16} : static_cast<uint64_t>(stride * 2); };
    return make_tensor_map(dtype == DType::kBFloat16, x.address, {size(dim), size(x.seq), size(x.heads), size(batch)},
                           {bytes(x.seq, x.stride_token), bytes(x.heads, x.stride_head), bytes(batch, x.stride_batch)},
                           {kPanel, static_cast<uint32_t>(rows), 1, 1});
}

template <class T, int kDim>
void forward_as(const AttentionForward& f) {
    Arguments a;
    a.query = map_of(f.dtype, f.batch, kDim, f.query, kQueries);
    a.key = map_of(f.dtype, f.batch, kDim, f.key, kKeys);
    a.value = map_of(f.dtype, f.batch, kDim, f.value, kKeys);
    a.out = f.out;
    a.lse = f.lse;
    a.heads = static_cast<int>(f.query.heads);
    a.heads_of_key = static_cast<int>(f.query.heads / f.key.heads);
    a.q_len = static_cast<int>(f.query.seq);
    a.k_len = static_cast<int>(f.key.seq);
    a.tiles = (a.q_len + kQueries - 1) / kQueries;
    a.pairs = static_cast<int>(f.batch * f.query.heads);
    const int64_t key_heads = f.section_bytes / (2 * f.key.seq * kDim * size_of(f.dtype));
    a.section = static_cast<int>(min(max(key_heads, int64_t{1}) * a.heads_of_key, int64_t{a.pairs}));
    a.left = static_cast<int>(f.window_left);
    a.right = static_cast<int>(f.window_right);
    a.diagonal = static_cast<int>(f.diagonal);
    a.scale_log2 = f.scale * 1.4426950408889634f;
    launch(attend_hopper<T, kDim>, int64_t{a.tiles} * a.pairs, kThreads, f.stream, a,
           static_cast<int>(sizeof(Shared<T, kDim>)));
}

}  // namespace

void attention_forward_hopper(const AttentionForward& f) {
    if (f.batch * f.query.heads * f.query.seq == 0) return;
    const bool wide = f.dim == 128;
    if (f.dtype == DType::kBFloat16) return wide ? forward_as<BFloat16, 128>(f) : forward_as<BFloat16, 64>(f);
    return wide ? forward_as<Half, 128>(f) : forward_as<Half, 64>(f);
}

}  // namespace fastattn::cuda
