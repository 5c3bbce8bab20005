// Runs CUDA kernels on the processor, to test their numerics: blocks one after the other, a block's threads as fibers of one
// thread of the system, which change places at barriers, at warp shuffles and where they wait for memory alone. Odd blocks run
// their threads in the reverse order, so that a barrier which is missing shows in one of the two. csrc/cuda/device.h includes
// this in the place of CUDA's headers; hopper_emulator.h has what only Hopper has.
//
// Not emulated: atomics, what the memory of a block holds at its start (it keeps what the block before left there).
#pragma once

#include <math.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <vector>

#define __global__
#define __grid_constant__
#define __device__
#define __launch_bounds__(...)
#define __shared__ static

using std::max;
using std::min;

namespace emulated {

struct Index {
    unsigned x = 0, y = 0, z = 0;
};

}  // namespace emulated

inline emulated::Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

enum class State { kReady, kAtBarrier, kAtShuffle, kDone };

class Block {
  public:
    explicit Block(int threads) : threads_(threads), fibers_(threads) {
        for (Fiber& fiber : fibers_) fiber.stack.reset(new char[kStack]);
    }

    void run(const std::function<void()>& kernel, bool reversed) {
        kernel_ = &kernel;
        current_block() = this;
        for (Fiber& fiber : fibers_) {
            fiber.state = State::kReady;
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = fiber.stack.get();
            fiber.context.uc_stack.ss_size = kStack;
            fiber.context.uc_link = &scheduler_;
            makecontext(&fiber.context, &Block::enter, 0);
        }
        while (true) {
            bool ran = false;
            for (int i = 0; i < threads_; ++i) {
                const int thread = reversed ? threads_ - 1 - i : i;
                if (fibers_[thread].state != State::kReady) continue;
                current_ = thread;
                threadIdx.x = static_cast<unsigned>(thread);
                swapcontext(&scheduler_, &fibers_[thread].context);
                if (error_) std::rethrow_exception(error_);
                ran = true;
            }
            if (count(State::kDone, 0, threads_) == threads_) return;
            if (!release() && !ran)
                throw std::runtime_error("CUDA emulator: threads of a block wait at different places");
        }
    }

    // A thread waits at a barrier of its block, or for the other lanes of its warp.
    void wait(State state) {
        Fiber& fiber = fibers_[current_];
        fiber.state = state;
        swapcontext(&fiber.context, &scheduler_);
    }

    // Every lane gives a value and takes that of another lane.
    template <class T>
    T shuffle(T value, int from_lane) {
        static_assert(sizeof(T) <= sizeof(uint64_t));
        const int warp = current_ / kWarp * kWarp, thread = current_;
        memcpy(&fibers_[thread].given, &value, sizeof(T));
        wait(State::kAtShuffle);
        T taken;
        memcpy(&taken, &fibers_[warp + from_lane].given, sizeof(T));
        wait(State::kAtShuffle);  // all have taken theirs before one gives another
        return taken;
    }

    // Lets the others go on until the condition holds, which one of them has to bring about.
    void wait_until(const std::function<bool()>& holds) {
        for (int64_t turns = 0; !holds(); ++turns) {
            if (turns > kMostTurns) throw std::runtime_error("CUDA emulator: a thread waits for what never comes");
            wait(State::kReady);
        }
    }

    int lane() const { return current_ % kWarp; }

    static Block*& current_block() {
        static Block* block = nullptr;
        return block;
    }

  private:
    static constexpr int kWarp = 32;
    static constexpr size_t kStack = 64 << 10;
    static constexpr int64_t kMostTurns = 1 << 20;

    struct Fiber {
        ucontext_t context;
        std::unique_ptr<char[]> stack;
        State state;
        uint64_t given;
    };

    static void enter() {
        Block* block = current_block();
        try {
            (*block->kernel_)();
        } catch (...) {
            block->error_ = std::current_exception();
        }
        block->fibers_[block->current_].state = State::kDone;
    }

    int count(State state, int first, int end) const {
        int found = 0;
        for (int i = first; i < end; ++i) found += fibers_[i].state == state;
        return found;
    }

    void make_ready(int first, int end) {
        for (int i = first; i < end; ++i) {
            if (fibers_[i].state != State::kDone) fibers_[i].state = State::kReady;
        }
    }

    // Lets those go on that waited for others who have come; threads that have ended count as having come to a barrier.
    bool release() {
        if (count(State::kAtBarrier, 0, threads_) + count(State::kDone, 0, threads_) == threads_) {
            make_ready(0, threads_);
            return true;
        }
        bool released = false;
        for (int first = 0; first < threads_; first += kWarp) {
            if (count(State::kAtShuffle, first, first + kWarp) == kWarp) {
                make_ready(first, first + kWarp);
                released = true;
            }
        }
        return released;
    }

    const int threads_;
    std::vector<Fiber> fibers_;
    ucontext_t scheduler_;
    const std::function<void()>* kernel_ = nullptr;
    std::exception_ptr error_;
    int current_ = 0;
};

inline std::mutex one_at_a_time;  // the indices above and what a block shares exist once

// ---- 16-bit floating types: to nearest, ties to even; NaN stays NaN -------------------------------------------------

inline float float_of_half(uint16_t bits) {
    _Float16 value;
    memcpy(&value, &bits, sizeof(bits));
    return static_cast<float>(value);
}

inline uint16_t half_of_float(float value) {
    const _Float16 narrow = static_cast<_Float16>(value);
    uint16_t bits;
    memcpy(&bits, &narrow, sizeof(bits));
    return bits;
}

inline float float_of_bfloat16(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    memcpy(&value, &wide, sizeof(wide));
    return value;
}

inline uint16_t bfloat16_of_float(float value) {
    if (value != value) return 0x7fff;
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace emulated

inline void __syncthreads() { emulated::Block::current_block()->wait(emulated::State::kAtBarrier); }

inline void __syncwarp() { emulated::Block::current_block()->wait(emulated::State::kAtShuffle); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int distance) {
    emulated::Block* block = emulated::Block::current_block();
    return block->shuffle(value, block->lane() ^ distance);
}

namespace fastattn::cuda {

// One launch at a time.
template <class Arguments>
void launch(void (*kernel)(Arguments), int64_t blocks, int threads, void*, const Arguments& arguments, int = 0) {
    const std::lock_guard<std::mutex> lock(emulated::one_at_a_time);
    emulated::Block block(threads);
    blockDim.x = static_cast<unsigned>(threads);
    gridDim.x = static_cast<unsigned>(blocks);
    const std::function<void()> body = [&] { kernel(arguments); };
    for (int64_t i = 0; i < blocks; ++i) {
        blockIdx.x = static_cast<unsigned>(i);
        block.run(body, i % 2 == 1);
    }
}

}  // namespace fastattn::cuda
