// Loops over independent tasks in torch's own OpenMP threads, and scratch memory for them.
//
// A task writes what no other task touches, in an order that does not depend on the thread that runs it, so results
// have the same bits at any number of threads. Scratch is allocated before the loop: inside, nothing may throw.
#pragma once

#include <stdint.h>

#include "process.h"

#ifdef _OPENMP
// Not <omp.h>: the library is the process's own, whichever it is, and these two are all that is asked of it.
extern "C" int omp_get_max_threads();
extern "C" int omp_get_thread_num();
#endif

namespace fastattn::FASTATTN_ISA {

// How many threads parallel_for will use at most for this many tasks; scratch is laid out by it.
inline int thread_count(int64_t tasks) {
#ifdef _OPENMP
    const int64_t most = threads_lost() ? 1 : omp_get_max_threads();
#else
    const int64_t most = 1;
#endif
    const int64_t count = tasks < most ? tasks : most;
    return count < 1 ? 1 : static_cast<int>(count);
}

// Runs body(task, thread) for task 0 … tasks - 1, thread in 0 … thread_count(tasks) - 1. Threads take the next task as
// they become free.
template <class Body>
inline void parallel_for(int64_t tasks, const Body& body) {
    const int threads = thread_count(tasks);
    if (threads == 1) {
        for (int64_t task = 0; task < tasks; ++task) body(task, 0);
        return;
    }
#ifdef _OPENMP
#    pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t task = 0; task < tasks; ++task) body(task, omp_get_thread_num());
#endif
}

// `count` elements for each of `threads` threads, each thread's part on cache lines of its own.
template <class T>
class Scratch {
  public:
    Scratch(int64_t count, int threads = 1)
        : stride_((count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64 / static_cast<int64_t>(sizeof(T))),
          data_(static_cast<T*>(scratch_allocate(static_cast<size_t>(stride_) * threads * sizeof(T)))) {}
    ~Scratch() { scratch_free(data_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    T* of(int thread) const { return data_ + stride_ * thread; }
    T* get() const { return data_; }

  private:
    static_assert(64 % sizeof(T) == 0, "a cache line holds whole elements");
    int64_t stride_;
    T* data_;
};

}  // namespace fastattn::FASTATTN_ISA
