#include "threads.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if defined(_WIN32)
#include <process.h>
#define FK_PROCESS_ID _getpid
#else
#include <unistd.h>
#define FK_PROCESS_ID getpid
#endif

#if defined(__x86_64__) || defined(__i386__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace fedkernels {
namespace {

// How long an idle thread turns before it sleeps. Waking a sleeping thread costs some 10 us, as much
// as a small kernel; a kernel is often followed by the next within this time.
constexpr auto kTurns = std::chrono::microseconds(20);

void relax() {
#if defined(__x86_64__) || defined(__i386__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Pool {
 public:
  void run(int chunks, int threads, const std::function<void(int)>& chunk) {
    grow(threads - 1);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      chunk_ = &chunk;
      chunks_ = chunks;
      next_.store(0);
      helpers_ = threads - 1;
      working_.store(threads - 1);
      generation_.fetch_add(1);
    }
    wake_.notify_all();
    take();
    // On a busy machine the others may wait for the very core that this thread would turn on.
    for (int turns = 0; working_.load(std::memory_order_acquire) > 0; ++turns) {
      if (turns < 1024) {
        relax();
      } else {
        std::this_thread::yield();
        turns = 0;
      }
    }
  }

 private:
  void take() {
    for (int i = next_.fetch_add(1); i < chunks_; i = next_.fetch_add(1)) (*chunk_)(i);
  }

  void grow(int helpers) {
    while (static_cast<int>(workers_.size()) < helpers) {
      const int index = static_cast<int>(workers_.size());
      workers_.emplace_back([this, index, seen = generation_.load()]() mutable {
        for (;;) {
          const Call call = wait(seen);
          seen = call.generation;
          if (index >= call.helpers) continue;
          take();
          working_.fetch_sub(1, std::memory_order_release);
        }
      });
      workers_.back().detach();
    }
  }

  // Which call a thread belongs to and how many that call wants, read as one: run() does not wait for
  // the threads that it does not want, so by the time one of them looks the next call may have begun.
  struct Call {
    std::uint64_t generation;
    int helpers;
  };

  Call wait(std::uint64_t seen) {
    const auto end = std::chrono::steady_clock::now() + kTurns;
    while (std::chrono::steady_clock::now() < end) {
      for (int i = 0; i < 32; ++i) {
        if (generation_.load(std::memory_order_acquire) != seen) {
          const std::lock_guard<std::mutex> lock(mutex_);  // what run() wrote is now complete
          return {generation_.load(), helpers_};
        }
        relax();
      }
    }
    std::unique_lock<std::mutex> lock(mutex_);
    wake_.wait(lock, [&] { return generation_.load() != seen; });
    return {generation_.load(), helpers_};
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> workers_;
  const std::function<void(int)>* chunk_ = nullptr;
  int chunks_ = 0;
  int helpers_ = 0;
  std::atomic<int> next_{0};
  std::atomic<int> working_{0};
  std::atomic<std::uint64_t> generation_{0};
};

std::mutex in_use;
Pool* pool = nullptr;  // never deleted: its threads may outlive static objects
int pool_process = 0;

}  // namespace

void parallel_for(std::int64_t count, std::int64_t grain, int threads,
                  const std::function<void(std::int64_t, std::int64_t)>& body) {
  if (count <= 0) return;
  const std::int64_t pieces = (count + grain - 1) / grain;
  std::unique_lock<std::mutex> lock(in_use, std::defer_lock);
  if (threads <= 1 || pieces <= 1 || !lock.try_lock()) {
    body(0, count);
    return;
  }
  // A forked child has none of its parent's threads; it gets a pool of its own.
  if (pool == nullptr || pool_process != FK_PROCESS_ID()) {
    pool = new Pool();
    pool_process = FK_PROCESS_ID();
  }
  if (threads > pieces) threads = static_cast<int>(pieces);
  // Some more chunks than threads, so that a thread which the system held up does not hold up all.
  const std::int64_t most = 4 * std::int64_t{threads};
  const std::int64_t chunks = pieces < most ? pieces : most;
  pool->run(static_cast<int>(chunks), threads, [&](int chunk) {
    const std::int64_t first = pieces * chunk / chunks * grain;
    const std::int64_t past = pieces * (chunk + 1) / chunks * grain;
    body(first, past < count ? past : count);
  });
}

}  // namespace fedkernels
