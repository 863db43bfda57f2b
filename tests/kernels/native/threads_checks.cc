// The thread pool, for ThreadSanitizer: calls of changing size, one after another, as kernels make
// them. A call may return only when every piece was done, once, and nobody is in the body any more.

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <vector>

#include "threads.h"

int main() {
  constexpr int kCalls = 20000;
  constexpr int kThreads[] = {2, 5, 3, 4, 2, 3};  // a thread is left out of one call, then wanted
  for (int call = 0; call < kCalls; ++call) {
    const int threads = kThreads[call % 6];
    const std::int64_t pieces = call % 3 == 0 ? 2 : 4 * threads + call % 5;
    std::vector<int> done(pieces, 0);          // plain, so that ThreadSanitizer watches them
    std::atomic<int> inside{0};
    fedkernels::parallel_for(pieces, 1, threads, [&](std::int64_t begin, std::int64_t end) {
      inside.fetch_add(1, std::memory_order_relaxed);
      for (std::int64_t i = begin; i < end; ++i) ++done[i];
      inside.fetch_sub(1, std::memory_order_relaxed);
    });
    if (inside.load() != 0) {
      std::printf("call %d returned while a piece was being done\n", call);
      return 1;
    }
    for (const int times : done) {
      if (times != 1) {
        std::printf("call %d did a piece %d times\n", call, times);
        return 1;
      }
    }
  }
  std::printf("threads: %d calls, each piece done once\n", kCalls);
  return 0;
}
