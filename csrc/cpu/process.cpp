// Memory, and what a fork does to threads. Compiled once, for any machine.
#include "process.h"

#include <stdint.h>
#include <stdlib.h>
#if defined(__linux__)
#    include <pthread.h>
#    include <sys/mman.h>
#    include <sys/stat.h>
#endif

#include <atomic>
#include <new>

namespace fastattn {
namespace {

constexpr size_t kHugePage = size_t{1} << 21, kHugeFrom = 2 * kHugePage, kLine = 64;

// Scratch that is not in use, for whoever asks next: memory fresh from the system costs a small product a tenth of its
// time. Small blocks malloc keeps by itself. Before what is given away a block has a line of its own, with its size.
constexpr size_t kKeptFrom = size_t{1} << 17, kKeptTo = size_t{12} << 20;
std::atomic<char*> kept[4];

#ifdef __SANITIZE_ADDRESS__  // which would not see what lies beyond the end of a block that is larger than asked for
constexpr bool kKeeps = false;
#else
constexpr bool kKeeps = true;
#endif

size_t& size_of(char* block) { return *reinterpret_cast<size_t*>(block); }

bool worth_keeping(size_t bytes) { return kKeeps && bytes >= kKeptFrom && bytes <= kKeptTo; }

}  // namespace

void* scratch_allocate(size_t bytes) {
    for (auto& place : kept) {
        if (!worth_keeping(bytes)) break;
        char* block = place.exchange(nullptr);
        if (block && size_of(block) >= bytes && size_of(block) / 4 <= bytes) return block + kLine;
        if (block) free(place.exchange(block));  // back, in the place of what came meanwhile
    }
    const size_t whole = bytes + kLine;
    void* memory = nullptr;
    if (whole < bytes || posix_memalign(&memory, whole >= kHugeFrom ? kHugePage : kLine, whole) != 0) {
        throw std::bad_alloc();
    }
    use_huge_pages(memory, whole);
    char* const block = static_cast<char*>(memory);
    size_of(block) = bytes;
    return block + kLine;
}

void scratch_free(void* memory) {
    char* block = static_cast<char*>(memory) - kLine;
    if (worth_keeping(size_of(block))) {  // in the first place, whose block goes to the second, and so on
        for (auto& place : kept) {
            if (block) block = place.exchange(block);
        }
    }
    free(block);
}

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
