// Additive attention (Bahdanau, Cho and Bengio, 2015), forward.
//
//     s   = v . tanh(w_query . query + w_key . key) + mask          additive_attention.h
//     out = dropout(softmax(s)) . value
//
// A chunk of queries at a time: strips of them, in parallel, become scores and then weights, in the tensors' dtype; the
// products with the values follow (gemm.h), a batch element at a time.
//
//     queries ─► a ─┐
//                   ├─► scores (chunk, keys) ─► weights ─► out
//     keys    ─► b ─┘
//
// Work: as additive_attention.h says, and 2 queries keys value_dim flops. Must move: query, key, value and out once, the
// projections twice.
#include "additive_attention.h"

namespace fastattn::FASTATTN_ISA {
namespace {

using namespace additive;

template <class T>
void forward(const AdditiveAttentionForward& args) {
    const int64_t batch = args.batch, queries = args.max_q, keys = args.max_k, dim = args.value.size[2];
    const int64_t hidden = args.v.size[0];
    if (batch * queries == 0) return;
    const bool kept = args.projected_query.present();
    const Scratch<float> scratch(kept ? 0 : batch * (queries + keys) * hidden);
    float* plain_query = kept ? args.projected_query.as<float>() : scratch.get();
    float* plain_key = kept ? args.projected_key.as<float>() : scratch.get() + batch * queries * hidden;
    project<T>(args.query, args.w_query, plain_query);
    project<T>(args.key, args.w_key, plain_key);
    Projected a(batch * queries, hidden), b(batch * keys, hidden);
    a.find(plain_query);
    b.find(plain_key);

    const Scores<T> scores(args, args.v, a, b);
    const Score& score = scores.score();
    const int64_t stride = row_stride(keys), columns = round_up(keys, kLanes);
    const Chunks chunks(batch, queries, stride);
    const Scratch<float> memory(chunks.most_rows() * stride);
    const bool parallel = batch * queries * keys * larger(hidden, 1) > kWorthThreads;
    chunks.each([&](const Chunk& chunk) {
        auto row_of = [&](int64_t b, int64_t i) { return memory.get() + chunk.row(b, i) * stride; };
        Chunks::each_strip(chunk, parallel, [&](int64_t b, int64_t i, int64_t count, int) {
            float* rows = row_of(b, i);
            scores.find(b, i, count, rows, stride);
            for (int64_t r = 0; r < count; ++r) {
                float* row = rows + r * stride;
                const float total = scores.find_exponentials(row);
                if (score.drops()) score.drop_row(sequence_of(args, b), queries, b, 0, i + r, 0, keys, row);
                const float scale = total == 0.0f ? 0.0f : 1.0f / total;
                // In the scores' place, which narrower weights trail behind.
                T* weights = reinterpret_cast<T*>(row);
                for (int64_t c = 0; c < columns; c += kLanes) {
                    const Vec kept = load(row + c);
                    store(weights + c, select(has_no_weight(kept), Vec{}, kept * scale));
                }
            }
        });
        for (int64_t b = chunk.batch; b < chunk.batch + chunk.batches; ++b) {
            const Matrix<T> weights{reinterpret_cast<const T*>(row_of(b, chunk.first)),
                                    stride * static_cast<int64_t>(sizeof(float) / sizeof(T)), 1};
            gemm(chunk.queries, dim, keys, weights, matrix_at<T>(args.value, b, 0),
                 [&, b](int64_t row, int64_t column, int64_t count, const float* sums) {
                     T* to = args.out.as<T>() + (b * queries + chunk.first + row) * dim + column;
                     each_vector(0, count, [&](int64_t i, int, auto lanes) FASTATTN_BODY {
                         store(to + i, load(sums + i), lanes);
                     });
                 });
        }
    });
}

}  // namespace

void additive_attention_forward(const AdditiveAttentionForward& args) {
    with_dtype(args.query.dtype, [&](auto* element) { forward<std::remove_pointer_t<decltype(element)>>(args); });
}

}  // namespace fastattn::FASTATTN_ISA
