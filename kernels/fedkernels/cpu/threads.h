// A pool of threads of this extension's own. It is not OpenMP, because the runtime that torch brings
// with it and the one that a compiler links are two, each with threads that wait for work by turning.
#pragma once

#include <cstdint>
#include <functional>

namespace fedkernels {

// Calls body(begin, end) on disjoint ranges that cover [0, count), on up to `threads` threads, the
// caller among them; returns when all are done. Ranges are multiples of `grain` long (but for the
// last), and their number and borders depend on nothing but the arguments. Calls from several threads
// at once, and calls inside a body, run in the calling thread alone. A body must not throw.
void parallel_for(std::int64_t count, std::int64_t grain, int threads,
                  const std::function<void(std::int64_t, std::int64_t)>& body);

}  // namespace fedkernels
