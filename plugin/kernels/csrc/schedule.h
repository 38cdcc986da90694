// In which order a step goes through the layers, so that the second pass finds in the caches what the first has read.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "chunk_queues.h"
#include "threads.h"

namespace largebatch {

struct Schedule {
  int num_threads = 0;
  std::vector<Chunks> waves;    // one after the other: all threads do the first pass, wait for each other, do the second
  std::vector<Chunks> batches;  // each by one thread, from the largest to the smallest: one computes while another reads
  size_t longest = 0;           // of all these, in chunks
};

// Elements of the chunks before the c-th, where cumulative[c] are those up to its end.
inline int64_t numel_before(const std::vector<int64_t>& cumulative, int c) { return c == 0 ? 0 : cumulative[c - 1]; }

inline int64_t numel_of(const std::vector<int64_t>& cumulative, Chunks chunks) {
  return numel_before(cumulative, chunks.end) - numel_before(cumulative, chunks.begin);
}

// A layer goes to one thread if as many such layers as there are threads fit into half of the third-level cache, and if it is
// small beside a thread's share of all. No bit depends on it.
inline Schedule schedule_for(const std::vector<int>& first_chunks, const std::vector<int64_t>& cumulative, int num_threads) {
  const int64_t bytes = 12;                     // an element's weight and state, in fp32: what the second pass reads
  const int64_t bytes_with_grad = bytes + 4;
  const int64_t total = cumulative.empty() ? 0 : cumulative.back();
  const int64_t alone = std::min(third_level_cache_bytes() / 2 / num_threads / bytes, total / num_threads / 8);
  const int64_t thread_numel = second_level_cache_bytes() * 3 / 4 / bytes_with_grad;
  Schedule schedule{num_threads};
  auto add = [&](std::vector<Chunks>& list, Chunks layer, int64_t limit) {
    const bool follows = !list.empty() && list.back().end == layer.begin;
    if (follows && numel_of(cumulative, {list.back().begin, layer.end}) <= limit) {
      list.back().end = layer.end;
    } else {
      list.push_back(layer);
    }
  };
  for (size_t l = 0; l + 1 < first_chunks.size(); ++l) {
    const Chunks layer{first_chunks[l], first_chunks[l + 1]};
    if (layer.empty()) continue;
    if (numel_of(cumulative, layer) <= alone) {
      add(schedule.batches, layer, thread_numel);
    } else {
      add(schedule.waves, layer, num_threads * thread_numel);
    }
  }
  std::stable_sort(schedule.batches.begin(), schedule.batches.end(),
                   [&](Chunks a, Chunks b) { return numel_of(cumulative, a) > numel_of(cumulative, b); });
  for (const auto* list : {&schedule.waves, &schedule.batches})
    for (Chunks chunks : *list) schedule.longest = std::max(schedule.longest, static_cast<size_t>(chunks.end - chunks.begin));
  return schedule;
}

// A thread's own part of some chunks: about as many elements as each other thread's.
inline Chunks share_of(Chunks chunks, const std::vector<int64_t>& cumulative, int thread, int num_threads) {
  const int64_t before = numel_before(cumulative, chunks.begin), numel = numel_of(cumulative, chunks);
  auto cut = [&](int i) {
    if (i == num_threads) return chunks.end;
    const auto first = cumulative.begin() + chunks.begin, end = cumulative.begin() + chunks.end;
    return static_cast<int>(std::lower_bound(first, end, before + numel * i / num_threads) - cumulative.begin());
  };
  return {cut(thread), cut(thread + 1)};
}

}  // namespace largebatch
