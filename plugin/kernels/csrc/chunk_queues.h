// Which thread does which chunk. Each has a range of its own; one that is through with it takes chunks from the end of
// others' ranges, because two threads are rarely as fast as each other: neighbours on the same machine, cores of two kinds.
// No bit depends on it.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "threads.h"

namespace largebatch {

// [begin, end)
struct Chunks {
  int begin = 0, end = 0;
  bool empty() const { return begin >= end; }
};

class ChunkQueues {
 public:
  static constexpr int num_sets = 2;  // that of the next wave is filled while others are still at work on this one

  explicit ChunkQueues(int max_threads) : queues_(static_cast<size_t>(num_sets) * max_threads), max_threads_(max_threads) {}

  // By the thread whose queue it is; there must be a barrier before anybody takes from the set.
  void fill(int set, int thread, int begin, int end) { queue(set, thread).store(packed(begin, end), std::memory_order_relaxed); }

  // Chunks for a thread to do: some of its own from the first to the last, then others' last ones, one by one; none if
  // there are none left.
  Chunks take(int set, int thread, int team) {
    Chunks chunks = first_of(queue(set, thread));
    // as many others as the team has binary digits, so that a large one does not end each wave with looking for work
    for (int distance = 1; chunks.empty() && distance < team; distance *= 2)
      if ((thread ^ distance) < team) chunks = last_of(queue(set, thread ^ distance));
    return chunks;
  }

 private:
  using Range = std::atomic<uint64_t>;  // begin and end

  struct alignas(64) Queue {
    Range range{0};
  };

  static uint64_t packed(int begin, int end) { return static_cast<uint64_t>(begin) << 32 | static_cast<uint32_t>(end); }
  static Chunks unpacked(uint64_t range) { return {static_cast<int>(range >> 32), static_cast<int>(range & 0xFFFFFFFFu)}; }

  Range& queue(int set, int thread) { return queues_[static_cast<size_t>(set) * max_threads_ + thread].range; }

  // A quarter of what is left, up to four chunks: each exchange makes the processor wait for all loads under way.
  static Chunks first_of(Range& range) {
    uint64_t seen = range.load(std::memory_order_relaxed);
    for (Chunks left = unpacked(seen); !left.empty(); left = unpacked(seen)) {
      const int end = left.begin + std::clamp((left.end - left.begin) / 4, 1, 4);
      if (range.compare_exchange_weak(seen, packed(end, left.end), std::memory_order_relaxed)) return {left.begin, end};
    }
    return {};
  }

  static Chunks last_of(Range& range) {
    uint64_t seen = range.load(std::memory_order_relaxed);
    for (Chunks left = unpacked(seen); !left.empty(); left = unpacked(seen))
      if (range.compare_exchange_weak(seen, packed(left.begin, left.end - 1), std::memory_order_relaxed))
        return {left.end - 1, left.end};
    return {};
  }

  std::vector<Queue> queues_;
  int max_threads_;
};

// Calls work(chunk) for each chunk in [0, count) on a team of threads.
template <class Work>
void for_each_chunk(int count, int num_threads, Work work) {
  ChunkQueues queues(num_threads);
  in_parallel(num_threads, [&](int thread, int team) {
    queues.fill(0, thread, static_cast<int>(int64_t{count} * thread / team),
                static_cast<int>(int64_t{count} * (thread + 1) / team));
    barrier(team);
    for (Chunks taken; !(taken = queues.take(0, thread, team)).empty();)
      for (int c = taken.begin; c < taken.end; ++c) work(c);
  });
}

}  // namespace largebatch
