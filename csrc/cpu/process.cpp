// Memory, and what a fork does to threads. Compiled once, for any machine.
#include "process.h"

#include <stdint.h>
#include <stdlib.h>
#if defined(__linux__)
#    include <pthread.h>
#    include <sys/mman.h>
#    include <sys/stat.h>
#endif

#include <new>

namespace fastattn {
namespace {

constexpr size_t kHugePage = size_t{1} << 21, kHugeFrom = 2 * kHugePage;

}  // namespace

void* scratch_allocate(size_t bytes) {
    constexpr size_t kLine = 64;
    void* memory = nullptr;
    if (posix_memalign(&memory, bytes >= kHugeFrom ? kHugePage : kLine, bytes ? bytes : kLine) != 0) {
        throw std::bad_alloc();
    }
    use_huge_pages(memory, bytes);
    return memory;
}

void scratch_free(void* memory) { free(memory); }

// One fault for 2 MiB. Those of small pages take two to three times as long as filling the memory, and glibc returns
// blocks of 32 MiB and more to the system each time they are freed.
void use_huge_pages(void* memory, size_t bytes) {
#ifdef MADV_HUGEPAGE
    if (bytes < kHugeFrom) return;
    const auto begin = reinterpret_cast<uintptr_t>(memory);
    const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage,
                    end = (begin + bytes) / kHugePage * kHugePage;
    madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

#if defined(__linux__)
namespace {

bool other_threads_at_fork = false, forked_from_threads = false;

void before_fork() {
    struct stat tasks;  // a directory with one entry a thread, beside "." and ".."
    other_threads_at_fork = stat("/proc/self/task", &tasks) != 0 || tasks.st_nlink > 3;
}
void in_child() { forked_from_threads = forked_from_threads || other_threads_at_fork; }

[[maybe_unused]] const int watching = pthread_atfork(before_fork, nullptr, in_child);

}  // namespace

bool threads_lost() { return forked_from_threads; }
#else
bool threads_lost() { return false; }
#endif

}  // namespace fastattn
