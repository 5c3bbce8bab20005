// The matrix product of linear and feed-forward, blocked for the caches:
//
//     C (rows x columns)  =  A (rows x depth) . B (depth x columns),   given to an epilogue a row's stretch at a time
//
//                  packed panels of B         A task is a block of C: up to kBlockRows rows and kBlockColumns columns.
//                 +-----+-----+-----+         B is packed first, by all threads, into panels of kTileColumns columns,
//        depth    |  |  |  |  |  |  |         float32 or bfloat16 pairs. A strip of A (a tile's rows x depth block, 9 KiB)
//        block    +-----+-----+-----+         stays in the first-level cache while the panels of the block pass, from
//                                             the second-level cache or the third; it is read where it lies if its
//     strip       +-----+-----+-----+         rows lie along the depth in the right dtype, else it is converted,
//     of A   ===  |  |  |  |tile |  |         transposed or moved on the way. Blocks are wide so that A is read once or
//                 +-----+-----+-----+         twice, and C written in whole rows: narrower ones cost a tenth of the time
//                 |     |     |     |         where the depth is short.
//
// A matrix unit (matrix_unit.h) multiplies so much faster that panels of B from the third-level cache would hold it up:
// there blocks have four times the rows and a third of the columns or less, so that their part of B stays in the second
// level. Sums that are read again cost it as much, so that a depth block has four times the steps.
//
// Sums over more than kDepthBlock are made in equal parts, added in order: for accuracy, and to fit the caches. The cut
// depends on the shape alone, so results do not depend on the number of threads.
//
// Work: 2 rows columns depth flops; a tile's depth block takes kTileRows * kTileVectors multiply-adds a step and is the
// only thing that is not small beside it. Memory: A and B are read once (A once more for every kBlockColumns columns,
// from the cache if it fits), and the packed panels of B, at most kPackedAtOnce bytes at a time, are written once.
#pragma once

#include "product.h"

namespace fastattn::FASTATTN_ISA {

namespace gemm_detail {

constexpr int64_t kDepthAtOnce = 4096;               // steps packed at a time
constexpr int64_t kRowsAtOnce = 2016;                // if the depth is packed in parts; a multiple of every kTileRows
constexpr int64_t kPackedAtOnce = int64_t{8} << 20;  // bytes
constexpr int64_t kTasks = 32, kTasksOfThread = 8;   // blocks are made smaller to have so many, the fewer of the two

template <class T>
class Product {
    typedef Multiplied<T> M;
    typedef typename M::Element Element;
    typedef typename M::Step Step;
    static constexpr int64_t kSteps = M::kSteps;
    static constexpr int64_t kRows = kStripRows<Step>;
    static constexpr int64_t kBlockRows = gemm_detail::kBlockRows<Step>, kBlockStrips = kBlockRows / kRows;
    static constexpr int64_t kDepthBlock = kOnUnit<Step> ? 768 : 192;  // steps
    static constexpr int64_t kWhole = kSteps * kWholeSteps<Step>;      // elements that the depth is filled up to

  public:
    Product(int64_t rows, int64_t columns, int64_t depth, Matrix<T> a, Matrix<T> b)
        : rows_(rows), columns_(columns), depth_(depth), a_(a), b_(b) {
        const int64_t steps = larger(ceil_div(depth, kSteps), 1);
        depth_block_ = round_up(ceil_div(steps, ceil_div(steps, kDepthBlock)), kLanes) * kSteps;
        depth_at_once_ = steps <= kDepthAtOnce ? larger(depth, 1) : kDepthAtOnce * kSteps / depth_block_ * depth_block_;
        panel_size_ = round_up(depth_at_once_, kWhole) / kSteps * kTileColumns;
        const int64_t panels = ceil_div(columns, kTileColumns), strips = ceil_div(rows, kRows);
        const int64_t panels_at_once = larger(kPackedAtOnce / (panel_size_ * static_cast<int64_t>(sizeof(Step))), 1);
        panels_at_once_ = ceil_div(panels, ceil_div(panels, panels_at_once));
        rows_at_once_ = depth_at_once_ < depth ? smaller(rows, kRowsAtOnce) : rows;
        parallel_ = worth_threads(rows, columns, steps);
        threads_ = parallel_ ? thread_count(int64_t{1} << 30) : 1;
        block_strips_ = kBlockStrips;
        const int64_t most = block_columns(steps) / kTileColumns;
        block_panels_ = ceil_div(panels, ceil_div(panels, most));
        // Smaller blocks where these would be few; narrow ones last. An element's sum is the same in any block.
        const int64_t tasks = smaller(kTasks, threads_ * kTasksOfThread);
        auto few = [&] { return ceil_div(strips, block_strips_) * ceil_div(panels, block_panels_) < tasks; };
        while (few() && block_panels_ > kBlockStrips) block_panels_ = ceil_div(block_panels_, 2);
        if (few()) block_strips_ = kBlockStrips / 2;
        while (few() && block_panels_ > 2) block_panels_ = ceil_div(block_panels_, 2);
        in_place_ = std::is_same_v<T, Element> && a.column == 1 && a.row % kSteps == 0 && depth % kWhole == 0 &&
                    reinterpret_cast<uintptr_t>(a.data) % sizeof(Step) == 0 && !rows_collide();
        strip_row_ = depth_block_ / kSteps + kLanes;
    }

    void run(const Finish& finish) const {
        const int64_t columns_at_once = panels_at_once_ * kTileColumns;
        const bool in_parts = depth_at_once_ < depth_;
        const Scratch<Step> packed(panels_at_once_ * panel_size_);
        const Scratch<float> totals(in_parts ? round_up(rows_at_once_, kRows) * columns_at_once : 0);
        const int64_t strip_size = (a_.column == 1 ? kRows : kBlockRows) * strip_row_;
        const int64_t sum_rows = in_parts ? 0 : finish.transposed || depth_block_ < depth_ ? kBlockRows : kRows;
        const int64_t sum_stride = block_panels_ * kTileColumns;
        const Scratch<float> workspace(strip_size + sum_rows * sum_stride, threads_);

        for (int64_t c0 = 0; c0 < columns_; c0 += columns_at_once) {
            const int64_t columns = smaller(columns_at_once, columns_ - c0);
            const int64_t panels = ceil_div(columns, kTileColumns), column_blocks = ceil_div(panels, block_panels_);
            for (int64_t r0 = 0; r0 < rows_; r0 += rows_at_once_) {
                const int64_t rows = smaller(rows_at_once_, rows_ - r0), block_rows = block_strips_ * kRows;
                const int64_t row_blocks = ceil_div(rows, block_rows);
                for (int64_t d0 = 0; d0 == 0 || d0 < depth_; d0 += depth_at_once_) {
                    const int64_t depth = smaller(depth_at_once_, depth_ - d0);
                    if (in_parts || r0 == 0) pack(c0, columns, d0, depth, packed.get());
                    for_tasks(parallel_, row_blocks * column_blocks, [&](int64_t task, int thread) {
                        Block block;
                        block.row = task % row_blocks * block_rows;
                        block.rows = smaller(block_rows, rows - block.row);
                        block.column = task / row_blocks * sum_stride;
                        block.columns = smaller(sum_stride, columns - block.column);
                        float* memory = workspace.of(thread);
                        if (in_parts) {
                            block.stride = columns_at_once;
                            block.sums = totals.get() + block.row * block.stride + block.column;
                        } else {
                            block.stride = sum_stride;
                            block.sums = memory + strip_size;
                        }
                        block.keeps_rows = sum_rows != kRows;
                        block.depth_begin = d0, block.depth = depth;
                        block.row += r0;
                        multiply(block, packed.get() + block.column / kTileColumns * panel_size_, c0,
                                 reinterpret_cast<Step*>(memory), finish);
                    });
                }
            }
        }
    }

  private:
    // Part of C: rows counted from C's first, columns from the first that is packed.
    struct Block {
        int64_t row, rows, column, columns, depth_begin, depth;
        float* sums;
        int64_t stride;
        bool keeps_rows;  // whether sums has a place for each strip, or one for all
    };

    static constexpr int64_t block_columns(int64_t steps) {
        if (!kOnUnit<Step>) return 1536;
        return steps <= kDepthBlock / 2 ? 512 : steps <= kDepthBlock ? 384 : 256;
    }

    // Rows of A that would take the same few sets of the first-level cache.
    bool rows_collide() const { return (a_.row * static_cast<int64_t>(sizeof(T)) + 128) % 4096 < 256; }

    void pack(int64_t c0, int64_t columns, int64_t d0, int64_t depth, Step* packed) const {
        const int64_t panels = ceil_div(columns, kTileColumns), some = ceil_div(panels, kTasks);
        for_tasks(parallel_, ceil_div(panels, some), [&](int64_t task, int) {
            for (int64_t p = task * some; p < smaller((task + 1) * some, panels); ++p) {
                const Matrix<T> from = b_.from(d0, c0 + p * kTileColumns);
                const int64_t count = smaller(kTileColumns, columns - p * kTileColumns);
                if constexpr (M::kPairs) {
                    Step* panel = packed + p * panel_size_;
                    pack_pairs<kTileColumns>(from.data, from.row, from.column, depth, count, panel);
                    const int64_t steps = ceil_div(depth, kSteps), whole = round_up(depth, kWhole) / kSteps;
                    for (int64_t x = steps * kTileColumns; x < whole * kTileColumns; ++x) panel[x] = {};
                } else {
                    pack_panel(from.data, from.row, from.column, depth, count, packed + p * panel_size_);
                }
            }
        });
    }

    // A strip of A, as tile_product takes it.
    struct Strip {
        const Step* data;
        int64_t row, step;
    };

    // Strip `r` (rows) of the block, at depth d; `space` is what pack_strips has filled, or free.
    Strip load_strip(const Block& block, int64_t r, int64_t rows, int64_t d, int64_t depth, Step* space) const {
        if (a_.column != 1) {
            if constexpr (kOnUnit<Step>) return {space + r * strip_row_, strip_row_, 1};
            return {space + r * depth_block_ / kSteps, 1, kRows};
        }
        const Matrix<T> from = a_.from(block.row + r, d);
        if (in_place_ && (!kOnUnit<Step> || rows == kRows))
            return {reinterpret_cast<const Step*>(from.data), from.row / kSteps, 1};
        for (int64_t i = 0; i < rows; ++i) {
            Step* row = space + i * strip_row_;
            copy_row(from.data + i * from.row, 1, depth, reinterpret_cast<Element*>(row));
            for (int64_t s = ceil_div(depth, kSteps); s < round_up(depth, kWhole) / kSteps; ++s) row[s] = {};
        }
        return {space, strip_row_, 1};
    }

    // All strips of the block at depth d, where A's rows do not lie along the depth: a few steps of every strip at a
    // time, since the strips lie side by side in the same cache lines.
    void pack_strips(const Block& block, int64_t d, int64_t depth, Step* space) const {
        constexpr int64_t kSome = 16 * kSteps;  // whole kWholeSteps
        for (int64_t s = 0; s < depth; s += kSome) {
            for (int64_t r = 0; r < block.rows; r += kRows) {
                const Matrix<T> from = a_.from(block.row + r, d + s);
                const int64_t rows = smaller(kRows, block.rows - r), some = smaller(kSome, depth - s);
                Step* to = space + r * depth_block_ / kSteps + s / kSteps * kRows;
                if constexpr (kOnUnit<Step>) {
                    to = space + r * strip_row_ + s / kSteps;
                    pack_rows(from.data, from.column, from.row, some, rows, strip_row_, to);
                } else if constexpr (M::kPairs) {
                    pack_pairs<kTileRows>(from.data, from.column, from.row, some, rows, to);
                } else {
                    pack_strip(from.data, from.column, from.row, some, rows, to);
                }
            }
        }
    }

    void multiply(const Block& block, const Step* panels, int64_t c0, Step* space, const Finish& finish) const {
        const MatrixUnit<Step> unit;
        const bool last_part = block.depth_begin + block.depth >= depth_;
        for (int64_t d = 0; d == 0 || d < block.depth; d += depth_block_) {
            const int64_t depth = smaller(depth_block_, block.depth - d), steps = round_up(depth, kWhole) / kSteps;
            const bool last = last_part && d + depth >= block.depth, adds = block.depth_begin + d > 0;
            if (a_.column != 1) pack_strips(block, block.depth_begin + d, depth, space);
            for (int64_t r = 0; r < block.rows; r += kRows) {
                const int64_t rows = smaller(kRows, block.rows - r);
                const Strip strip = load_strip(block, r, rows, block.depth_begin + d, depth, space);
                float* sums = block.sums + (block.keeps_rows ? r * block.stride : 0);
                const Step* panel = panels + d / kSteps * kTileColumns;
                for (int64_t c = 0; c < block.columns; c += kTileColumns, panel += panel_size_) {
                    if (last) ask_for(finish, block.row + r, rows, c0 + block.column + c, block.columns - c);
                    if (block.columns - c > kLanes) {
                        tile_rows<Step>(static_cast<int>(rows), steps, strip.data, strip.row, strip.step, panel,
                                        kTileColumns, sums + c, block.stride, adds);
                    } else {
                        tile_rows<Step, kTileRows, 1>(static_cast<int>(rows), steps, strip.data, strip.row, strip.step,
                                                      panel, kTileColumns, sums + c, block.stride, adds);
                    }
                }
                if (last && !finish.transposed) {
                    finish.function(finish.epilogue, block.row + r, rows, c0 + block.column, block.columns, sums,
                                    block.stride);
                }
            }
        }
        if (last_part && finish.transposed) {
            finish.function(finish.epilogue, block.row, block.rows, c0 + block.column, block.columns, block.sums,
                            block.stride);
        }
    }

    // A tile's part of what the epilogue writes.
    static FASTATTN_INLINE void ask_for(const Finish& finish, int64_t row, int64_t rows, int64_t column,
                                        int64_t columns) {
        columns = smaller(columns, kTileColumns);
        for (const Written& written : finish.written) {
            if (finish.transposed) {
                written.ask_for(column, columns, row, rows);
            } else {
                written.ask_for(row, rows, column, columns);
            }
        }
    }

    int64_t rows_, columns_, depth_;
    Matrix<T> a_;
    Matrix<T> b_;
    int64_t depth_block_, depth_at_once_, rows_at_once_;  // elements, of whole steps but for the end
    int64_t panel_size_, panels_at_once_;
    int64_t block_strips_, block_panels_;
    int64_t strip_row_;
    int threads_;
    bool parallel_, in_place_;
};

}  // namespace gemm_detail
}  // namespace fastattn::FASTATTN_ISA
