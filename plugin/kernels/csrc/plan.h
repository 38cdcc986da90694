// The plan of a kernel call: what lies where, which thread does what when.
//
// A fused step goes through the layers few by few: first pass, trust ratios, second pass over what the caches still hold.
// Sums are taken chunk by chunk in a fixed order, so that neither the number of threads nor the schedule changes a bit.
// Nothing here knows Python or torch.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "instruction_sets.h"
#include "passes.h"
#include "rule.h"
#include "threads.h"

namespace largebatch {

// [begin, end)
struct Chunks {
  int begin = 0, end = 0;
};

// How a layer is to be treated, by its number in Python.
struct Treatment {
  double weight_decay, decoupled_weight_decay;
  uint32_t seed;
  bool is_adapted;
};

// A part of a layer that lies in a tensor; see largebatch.kernels.interface.Span.
struct Span {
  int64_t tensor, start, numel, row, layer_start;
};

// Where a weight and what belongs to it lie in this step: addresses of their first elements.
struct Place {
  char *weight, *grad, *state[2];
  const float* step;  // null if nobody counts
  Dtype weight_dtype, grad_dtype, state_dtype;
  bool may_overwrite_grad;
};

class Plan {
 public:
  Plan(std::vector<Span> spans, std::vector<Treatment> treatments, const Rule& rule)
      : rule_(rule), treatments_(std::move(treatments)), num_sums_(1 + num_directions_of(rule_)) {
    std::vector<bool> has_span(treatments_.size(), false);
    // short layers side by side, so that a thread has many of them in a row
    std::stable_partition(spans.begin(), spans.end(),
                          [](const Span& span) { return span.numel >= chunk_numel; });
    for (const auto& [tensor, start, numel, row, layer_start] : spans) {
      Layer layer{};
      layer.numel = numel;
      layer.layer_start = layer_start;
      tensors_.push_back(tensor);
      starts_.push_back(start);
      rows_.push_back(row);
      has_span[row] = true;
      first_chunks_.push_back(num_chunks());
      for (int64_t begin = 0; begin < numel; begin += chunk_numel) {
        layers_of_chunks_.push_back(static_cast<int>(layers_.size()));
        cumulative_.push_back(total_numel() + std::min(chunk_numel, numel - begin));
      }
      layers_.push_back(layer);
    }
    first_chunks_.push_back(num_chunks());
    for (size_t row = 0; row < treatments_.size(); ++row)
      if (!has_span[row]) empty_rows_.push_back(static_cast<int64_t>(row));
    sums_.resize(num_sums_ * num_chunks());
    if (normalises_gradients(rule_))
      grad_sums_.resize(num_chunks()), grad_norms_.resize(layers_.size());
  }

  int64_t num_layers() const { return static_cast<int64_t>(treatments_.size()); }
  int64_t num_sums() const { return num_sums_; }
  int64_t num_figures() const {
    return 3 + 2 * num_directions_of(rule_) + (normalises_gradients(rule_) ? 1 : 0);
  }
  int64_t total_numel() const { return cumulative_.empty() ? 0 : cumulative_.back(); }

  // What each of the next calls works on, to be said before it.
  void take(const std::vector<Place>& places, double grad_scale) {
    // a call has weights of one type
    is_fp64_ = !places.empty() && places[0].weight_dtype == Dtype::fp64;
    // the second pass of LAMB and its kin can do with the direction alone
    keeps_in_grads_ = rule_.algorithm >= Algorithm::lamb && num_directions_of(rule_) == 1;
    double last_step = -1;
    Scalars common{};
    for (int l = 0; l < num_spans(); ++l) {
      Layer& layer = layers_[l];
      const Place& place = places[tensors_[l]];
      const Treatment& treatment = treatments_[rows_[l]];
      const double step = place.step ? static_cast<double>(*place.step) + 1.0 : 0.0;
      if (step != last_step) common = scalars_of(rule_, last_step = step, grad_scale);
      layer.scalars = common;
      layer.scalars.weight_decay = treatment.weight_decay;
      layer.scalars.decay_in_direction = rule_.decay_before_norm ? treatment.weight_decay : 0.0;
      layer.rounding_key = rounding_key(treatment.seed, step);
      layer.weight_dtype = place.weight_dtype;
      layer.grad_dtype = place.grad_dtype;
      layer.state_dtype = place.state_dtype;
      layer.weight = place.weight + starts_[l] * size_of(place.weight_dtype);
      layer.grad = place.grad + starts_[l] * size_of(place.grad_dtype);
      for (int s = 0; s < 2; ++s)
        layer.state[s] =
            place.state[s] ? place.state[s] + starts_[l] * size_of(place.state_dtype) : nullptr;
      const bool has_room = layer.grad_dtype == (is_fp64_ ? Dtype::fp64 : Dtype::fp32) &&
                            layer.state_dtype != Dtype::bf16;
      if (!place.may_overwrite_grad || !has_room) keeps_in_grads_ = false;
    }
  }

  // The norms of whole layers' gradients, [num_layers], and whether their sums were finite; for rules that ask for them.
  void take_norms(const double* norms, const bool* are_finite) {
    for (int l = 0; l < num_spans(); ++l)
      set_grad_norm(layers_[l], norms[rows_[l]], are_finite[rows_[l]]);
  }

  // sums: [num_layers], zeros: of the squares of the gradients.
  void sums_before(double* sums, int num_threads) {
    for_each_chunk(num_threads, [&](int c) { add_gradients(c); });
    for (int l = 0; l < num_spans(); ++l) sums[rows_[l]] = grad_sum(l);
  }

  // sums: [num_layers, num_sums], zeros: of the squares of weights and directions.
  void accumulate(double* sums, int num_threads) {
    for_each_chunk(num_threads, [&](int c) { first(c); });
    for (int l = 0; l < num_spans(); ++l) layer_sums(l, sums + num_sums_ * rows_[l]);
  }

  // ratios: [num_layers, num_sums - 1]; the others [num_layers]; shrinkage may be null.
  void advance(double lr, const double* ratios, const double* weight_decays,
               const double* shrinkage, const bool* is_finite, int num_threads) {
    for (int l = 0; l < num_spans(); ++l) {
      const int64_t row = rows_[l];
      set_ratios(layers_[l].scalars, rule_, is_fp64_, lr, ratios + (num_sums_ - 1) * row,
                 weight_decays[row], shrinkage ? shrinkage[row] : 1.0);
    }
    for_each_chunk(num_threads, [&](int i) {
      const int c = num_chunks() - 1 - i;  // the last are still in the cache
      if (is_finite[rows_[layers_of_chunks_[c]]]) second(c, layers_[layers_of_chunks_[c]]);
    });
  }

  // A whole step. figures: [num_layers, num_figures], the rows of largebatch.telemetry.LayerStats; good: [num_layers], whether
  // the layer moved.
  void step(double lr, double* figures, bool* good, int num_threads) {
    const double nothing[1 + max_num_directions] = {};
    Layer empty{};
    std::fill_n(good, num_layers(), true);
    for (int64_t row : empty_rows_) decide(empty, row, nothing, 0.0, lr, figures);
    make_schedule(num_threads);
    std::atomic<size_t> next_batch{0};
    in_parallel(num_threads, [&](int thread, int team) {
      for (Chunks wave : waves_) step_of(wave, thread, team, lr, figures, good);
      for (size_t batch;
           (batch = next_batch.fetch_add(1, std::memory_order_relaxed)) < batches_.size();)
        step_of(batches_[batch], 0, 1, lr, figures, good);
    });
  }

 private:
  int num_spans() const { return static_cast<int>(layers_.size()); }
  int num_chunks() const { return static_cast<int>(layers_of_chunks_.size()); }

  // --- one call -------------------------------------------------------------------------------------------------------

  template <class Work> void for_each_chunk(int num_threads, Work work) {
    in_parallel(num_threads, [&](int thread, int team) {
      const Chunks own = share_of({0, num_chunks()}, thread, team);
      for (int c = own.begin; c < own.end; ++c) work(c);
    });
  }

  // A whole step of the layers of some chunks, by a thread of the team that does it.
  void step_of(Chunks all, int thread, int team, double lr, double* figures, bool* good) {
    const Chunks own = share_of(all, thread, team);
    if (normalises_gradients(rule_)) {
      for (int c = own.begin; c < own.end; ++c) add_gradients(c);
      barrier(team);
      find_grad_norms(all, thread, team);
      barrier(team);
    }
    for (int c = own.begin; c < own.end; ++c) first(c);
    barrier(team);
    int current = -1;
    bool is_good = false;
    Layer layer{};
    double found[1 + max_num_directions];
    for (int c = own.end - 1; c >= own.begin; --c) {  // the last are still in the cache
      const int l = layers_of_chunks_[c];
      // every thread that has a part of the layer computes the same; the one with its first chunk reports it
      const bool is_reporter = c == first_chunks_[l];
      if (l != current) layer_sums(l, found);
      if (l != current || is_reporter) {
        layer = layers_[l];
        const double grad_norm = grad_norms_.empty() ? 0.0 : grad_norms_[l];
        is_good = decide(layer, rows_[l], found, grad_norm, lr, is_reporter ? figures : nullptr);
        if (is_reporter) good[rows_[l]] = is_good;
        current = l;
      }
      if (is_good) second(c, layer);
    }
  }

  // Trust ratios of a layer from its sums of squares; false if the layer must not move.
  bool decide(Layer& layer, int64_t row, const double* sums, double grad_norm, double lr,
              double* out) const {
    const auto& [decay, decoupled_decay, seed, is_adapted] = treatments_[row];
    const double shrinkage = decoupled_decay != 0.0 ? 1.0 - lr * decoupled_decay : 1.0;
    double weight_norm = std::sqrt(sums[0]);
    if (shrinkage != 1.0) weight_norm *= std::abs(shrinkage);
    const int num_directions = num_directions_of(rule_);
    double norms[max_num_directions], ratios[max_num_directions];
    bool is_finite = std::isfinite(sums[0]);
    for (int i = 0; i < num_directions; ++i) {
      norms[i] = std::sqrt(sums[1 + i]);
      ratios[i] = is_adapted ? trust_ratio(rule_, weight_norm, norms[i], lr, decay) : 1.0;
      if (!is_fp64_) ratios[i] = static_cast<float>(ratios[i]);  // rounded once, here
      is_finite = is_finite && std::isfinite(sums[1 + i]);
    }
    const bool is_defined = weight_norm > 0 && norms[0] > 0;
    const double decay_in_force = rule_.skip_zero_norm_layers && !is_defined ? 0.0 : decay;
    if (out) {
      out += num_figures() * row;
      *out++ = weight_norm;
      out = std::copy_n(norms, num_directions, out);
      out = std::copy_n(ratios, num_directions, out);
      *out++ = local_lr(is_fp64_, lr, ratios[0]);
      *out++ = decay_in_force;
      if (normalises_gradients(rule_)) *out = grad_norm;
    }
    set_ratios(layer.scalars, rule_, is_fp64_, lr, ratios, decay_in_force, shrinkage);
    return is_finite;
  }

  // --- chunks -----------------------------------------------------------------------------------------------------------

  // Calls pass(layer's number, first element, end) for a chunk.
  template <class Pass> void with_elements(int c, Pass pass) const {
    const int l = layers_of_chunks_[c];
    const int64_t begin = (c - first_chunks_[l]) * chunk_numel;
    pass(l, begin, std::min(begin + chunk_numel, layers_[l].numel));
  }

  // The chunk's gradient, if the direction may take its place.
  void* kept(int l, int64_t begin) const {
    if (!keeps_in_grads_) return nullptr;
    return static_cast<char*>(const_cast<void*>(layers_[l].grad)) + begin * (is_fp64_ ? 8 : 4);
  }

  void first(int c) {
    with_elements(c, [&](int l, int64_t begin, int64_t end) {
      passes_in_use()->first(rule_.algorithm, is_fp64_, layers_[l], begin, end,
                             &sums_[num_sums_ * c], kept(l, begin));
    });
  }

  void second(int c, const Layer& layer) const {
    with_elements(c, [&](int l, int64_t begin, int64_t end) {
      passes_in_use()->second(rule_.algorithm, is_fp64_, layer, begin, end, kept(l, begin));
    });
  }

  void layer_sums(int l, double* out) const {
    std::fill_n(out, num_sums_, 0.0);
    for (int c = first_chunks_[l]; c < first_chunks_[l + 1]; ++c)
      for (int i = 0; i < num_sums_; ++i) out[i] += sums_[num_sums_ * c + i];
  }

  // --- norms of gradients, for rules that renew their state with them ---------------------------------------------------

  void add_gradients(int c) {
    with_elements(c, [&](int l, int64_t begin, int64_t end) {
      const Layer& layer = layers_[l];
      const double scale = layer.scalars.grad_scale;
      grad_sums_[c] =
          passes_in_use()->square_sum(layer.grad, layer.grad_dtype, is_fp64_, scale, begin, end);
    });
  }

  double grad_sum(int l) const {
    double sum = 0.0;
    for (int c = first_chunks_[l]; c < first_chunks_[l + 1]; ++c) sum += grad_sums_[c];
    return sum;
  }

  static void set_grad_norm(Layer& layer, double norm, bool is_finite) {
    layer.scalars.grad_norm = !is_finite ? std::nan("") : norm > 0 ? norm : 1.0;
  }

  // Of every team-th layer of these, which are all there.
  void find_grad_norms(Chunks chunks, int thread, int team) {
    for (int l = layers_of_chunks_[chunks.begin] + thread; l <= layers_of_chunks_[chunks.end - 1];
         l += team) {
      const double sum = grad_sum(l), norm = grad_norms_[l] = std::sqrt(sum);
      set_grad_norm(layers_[l], is_fp64_ ? norm : static_cast<float>(norm), std::isfinite(sum));
    }
  }

  // --- the schedule: in which order a step goes through the layers, so that the second pass finds them in the caches ------

  // Elements of the chunks before the c-th.
  int64_t numel_before(int c) const { return c == 0 ? 0 : cumulative_[c - 1]; }
  int64_t numel_of(Chunks chunks) const {
    return numel_before(chunks.end) - numel_before(chunks.begin);
  }

  // A thread's own part of some chunks: about as many elements as each other thread's.
  Chunks share_of(Chunks chunks, int thread, int team) const {
    auto cut = [&](int i) {
      if (i == team) return chunks.end;
      const int64_t wanted = numel_before(chunks.begin) + numel_of(chunks) * i / team;
      const auto first = cumulative_.begin() + chunks.begin, end = cumulative_.begin() + chunks.end;
      return static_cast<int>(std::lower_bound(first, end, wanted) - cumulative_.begin());
    };
    return {cut(thread), cut(thread + 1)};
  }

  // A layer goes to one thread if as many such layers as there are threads fit into half of the third-level cache, and if it
  // is small beside a thread's share of all: while one thread computes, another reads. No bit depends on it.
  void make_schedule(int num_threads) {
    if (scheduled_for_ == num_threads) return;
    scheduled_for_ = num_threads;
    waves_.clear(), batches_.clear();
    const int64_t bytes = 12;  // an element's weight and state, in fp32: what the second pass reads
    const int64_t alone = std::min(third_level_cache_bytes() / 2 / num_threads / bytes,
                                   total_numel() / num_threads / 8);
    const int64_t thread_numel = second_level_cache_bytes() * 3 / 4 / (bytes + 4);
    auto add = [&](std::vector<Chunks>& list, Chunks layer, int64_t limit) {
      if (!list.empty() && list.back().end == layer.begin &&
          numel_of({list.back().begin, layer.end}) <= limit) {
        list.back().end = layer.end;
      } else {
        list.push_back(layer);
      }
    };
    for (int l = 0; l < num_spans(); ++l) {
      const Chunks layer{first_chunks_[l], first_chunks_[l + 1]};
      if (layer.begin == layer.end) continue;
      const bool is_alone = numel_of(layer) <= alone;
      add(is_alone ? batches_ : waves_, layer,
          is_alone ? thread_numel : num_threads * thread_numel);
    }
    // from the largest to the smallest, so that the threads end together
    std::stable_sort(batches_.begin(), batches_.end(),
                     [&](Chunks a, Chunks b) { return numel_of(a) > numel_of(b); });
  }

  Rule rule_;
  std::vector<Treatment> treatments_;
  bool is_fp64_ = false, keeps_in_grads_ = false;  // of this call
  std::vector<Layer> layers_;                      // one a span
  std::vector<int64_t> tensors_, starts_, rows_;   // of each span
  std::vector<int64_t> empty_rows_;                // layers without an element here
  std::vector<int> first_chunks_;                  // of each span, and the end
  std::vector<int> layers_of_chunks_;              // [num_chunks] number of the span
  std::vector<int64_t> cumulative_;                // [num_chunks] elements up to each chunk's end
  int64_t num_sums_;                               // of weights and directions
  std::vector<double> sums_;                       // [num_chunks, num_sums]
  // of each chunk and span, for rules that ask for them
  std::vector<double> grad_sums_, grad_norms_;
  int scheduled_for_ = 0;  // threads
  // one after the other: all threads do the first pass, wait for each other, do the second
  std::vector<Chunks> waves_;
  std::vector<Chunks> batches_;  // each by one thread
};

}  // namespace largebatch
