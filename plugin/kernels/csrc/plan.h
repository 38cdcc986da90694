// The plan of a kernel call: what lies where, which thread does what when.
//
// A fused step goes through the layers few by few: first pass, trust ratios, second pass over what the caches still hold.
// Sums are taken chunk by chunk in a fixed order, so that neither the number of threads nor the schedule changes a bit.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "passes.h"
#include "rule.h"
#include "tensors.h"
#include "threads.h"

namespace largebatch {

const Passes*& passes_in_use();

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

class Plan {
 public:
  Plan(std::vector<at::Tensor> weights, std::vector<std::vector<at::Tensor>> states, std::vector<at::Tensor> steps,
       std::vector<std::array<int64_t, 5>> spans, const std::vector<double>& weight_decays,
       const std::vector<double>& decoupled_weight_decays, const std::vector<bool>& are_adapted,
       const std::vector<uint32_t>& seeds, const std::string& rule, const py::dict& options, bool may_overwrite_grads)
      : lookup_(std::move(weights), std::move(states), std::move(steps)),
        rule_(rule_of(rule, options)),
        may_overwrite_grads_(may_overwrite_grads),
        num_sums_(1 + num_directions_of(rule_)) {
    std::vector<bool> has_span(weight_decays.size(), false);
    for (size_t row = 0; row < weight_decays.size(); ++row)
      treatments_.push_back({weight_decays[row], decoupled_weight_decays[row], seeds[row], are_adapted[row]});
    // short layers side by side, so that a thread has many of them in a row
    std::stable_partition(spans.begin(), spans.end(), [](const auto& span) { return span[2] >= chunk_numel; });
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
    if (normalises_gradients(rule_)) grad_sums_.resize(num_chunks()), grad_norms_.resize(layers_.size());
  }

  // See Lookup.
  bool look_up(const py::list& grads) { return lookup_.renew(grads); }
  bool is_flat() const { return lookup_.is_flat(); }
  void count() { lookup_.count(); }

  // [num_layers, 1] fp64: sums of the squares of the gradients.
  at::Tensor sums_before(const py::list& grads, double grad_scale) {
    const std::vector<at::Tensor> copies = take(grads, grad_scale);
    at::Tensor sums = at::zeros({num_layers(), 1}, at::kDouble);
    py::gil_scoped_release release;
    for_each_chunk([&](int c) { add_gradients(c); });
    for (int l = 0; l < num_spans(); ++l) sums.data_ptr<double>()[rows_[l]] = grad_sum(l);
    return sums;
  }

  // [num_layers, num_sums] fp64: of the squares of weights and directions.
  // grad_norms: [num_layers] of whole layers, and whether their sums were finite; null for rules that do not ask.
  at::Tensor accumulate(const py::list& grads, double grad_scale, const std::optional<at::Tensor>& grad_norms,
                        const std::optional<at::Tensor>& are_finite) {
    const std::vector<at::Tensor> copies = take(grads, grad_scale);
    take_norms(grad_norms, are_finite);
    at::Tensor sums = at::zeros({num_layers(), num_sums_}, at::kDouble);
    py::gil_scoped_release release;
    for_each_chunk([&](int c) { first(c); });
    for (int l = 0; l < num_spans(); ++l) layer_sums(l, sums.data_ptr<double>() + num_sums_ * rows_[l]);
    return sums;
  }

  // ratios: [num_layers, 1] or [num_layers, 2].
  void advance(const py::list& grads, double grad_scale, double lr, const at::Tensor& ratios,
               const at::Tensor& weight_decays, const std::optional<at::Tensor>& shrinkage, const at::Tensor& is_finite,
               const std::optional<at::Tensor>& grad_norms, const std::optional<at::Tensor>& are_finite) {
    const std::vector<at::Tensor> copies = take(grads, grad_scale);
    take_norms(grad_norms, are_finite);
    const at::Tensor ratios64 = ratios.to(at::kDouble).contiguous();
    const double* ratio = ratios64.data_ptr<double>();
    const double* decay = weight_decays.data_ptr<double>();
    const double* shrink = shrinkage ? shrinkage->data_ptr<double>() : nullptr;
    const bool* good = is_finite.data_ptr<bool>();
    py::gil_scoped_release release;
    for (int l = 0; l < num_spans(); ++l) {
      const int64_t row = rows_[l];
      set_ratios(layers_[l].scalars, rule_, is_fp64_, lr, ratio + (num_sums_ - 1) * row, decay[row],
                 shrink ? shrink[row] : 1.0);
    }
    for_each_chunk([&](int i) {
      const int c = num_chunks() - 1 - i;  // the last are still in the cache
      if (good[rows_[layers_of_chunks_[c]]]) second(c, layers_[layers_of_chunks_[c]]);
    });
  }

  // A whole step. Returns [num_figures, num_layers] fp64, the rows of largebatch.telemetry.LayerStats; [num_layers] bool,
  // whether the layer moved; and whether all have.
  std::tuple<at::Tensor, at::Tensor, bool> step(const py::list& grads, double grad_scale, double lr) {
    const std::vector<at::Tensor> copies = take(grads, grad_scale);
    at::Tensor figures = at::zeros({num_layers(), num_figures()}, at::kDouble);
    at::Tensor moved = at::ones({num_layers()}, at::kBool);
    double* out = figures.data_ptr<double>();
    bool* good = moved.data_ptr<bool>();
    py::gil_scoped_release release;
    const double nothing[1 + max_num_directions] = {};
    Layer empty{};
    for (int64_t row : empty_rows_) decide(empty, row, nothing, 0.0, lr, out);
    const int num_threads = num_threads_for(total_numel());
    make_schedule(num_threads);
    std::atomic<size_t> next_batch{0};
    in_parallel(num_threads, [&](int thread, int team) {
      for (Chunks wave : waves_) step_of(wave, thread, team, lr, out, good);
      for (size_t batch; (batch = next_batch.fetch_add(1, std::memory_order_relaxed)) < batches_.size();)
        step_of(batches_[batch], 0, 1, lr, out, good);
    });
    return {figures.t(), moved, std::all_of(good, good + num_layers(), [](bool is) { return is; })};
  }

 private:
  int64_t num_layers() const { return static_cast<int64_t>(treatments_.size()); }
  int num_spans() const { return static_cast<int>(layers_.size()); }
  int num_chunks() const { return static_cast<int>(layers_of_chunks_.size()); }
  int64_t total_numel() const { return cumulative_.empty() ? 0 : cumulative_.back(); }
  int64_t num_figures() const { return 3 + 2 * num_directions_of(rule_) + (normalises_gradients(rule_) ? 1 : 0); }

  // --- one call -------------------------------------------------------------------------------------------------------

  // Addresses, as looked up, and scalars of this step. Returns what has to live as long as the call.
  std::vector<at::Tensor> take(const py::list& grads, double grad_scale) {
    std::vector<at::Tensor> copies = lookup_.lay_out(grads);
    const std::vector<Place>& places = lookup_.places();
    is_fp64_ = !places.empty() && places[0].weight_dtype == Dtype::fp64;  // a call has weights of one type
    // the second pass of LAMB and its kin can do with the direction alone
    keeps_in_grads_ = may_overwrite_grads_ && rule_.algorithm >= Algorithm::lamb && num_directions_of(rule_) == 1;
    double last_step = -1;
    Scalars common{};
    for (int l = 0; l < num_spans(); ++l) {
      Layer& layer = layers_[l];
      const Place& place = places[tensors_[l]];
      const Treatment& treatment = treatments_[rows_[l]];
      const double step = lookup_.counts_steps() ? static_cast<double>(*place.step) + 1.0 : 0.0;
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
      for (size_t s = 0; s < lookup_.num_states(); ++s)
        layer.state[s] = place.state[s] + starts_[l] * size_of(place.state_dtype);
      if (layer.state_dtype == Dtype::bf16) keeps_in_grads_ = false;
      // not through a copy of the gradient, which would not be there in the second pass of a step in two calls
      if (layer.grad_dtype != (is_fp64_ ? Dtype::fp64 : Dtype::fp32) || !place.is_grad_alike) keeps_in_grads_ = false;
    }
    return copies;
  }

  template <class Work>
  void for_each_chunk(Work work) {
    in_parallel(num_threads_for(total_numel()), [&](int thread, int team) {
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
  bool decide(Layer& layer, int64_t row, const double* sums, double grad_norm, double lr, double* out) const {
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
  template <class Pass>
  void with_elements(int c, Pass pass) const {
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
      passes_in_use()->first(rule_.algorithm, is_fp64_, layers_[l], begin, end, &sums_[num_sums_ * c], kept(l, begin));
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
      grad_sums_[c] = passes_in_use()->square_sum(layer.grad, layer.grad_dtype, is_fp64_, scale, begin, end);
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
    for (int l = layers_of_chunks_[chunks.begin] + thread; l <= layers_of_chunks_[chunks.end - 1]; l += team) {
      const double sum = grad_sum(l), norm = grad_norms_[l] = std::sqrt(sum);
      set_grad_norm(layers_[l], is_fp64_ ? norm : static_cast<float>(norm), std::isfinite(sum));
    }
  }

  void take_norms(const std::optional<at::Tensor>& grad_norms, const std::optional<at::Tensor>& are_finite) {
    if (!grad_norms) return;
    const at::Tensor norms = grad_norms->to(at::kDouble).contiguous();
    for (int l = 0; l < num_spans(); ++l)
      set_grad_norm(layers_[l], norms.data_ptr<double>()[rows_[l]], are_finite->data_ptr<bool>()[rows_[l]]);
  }

  // --- the schedule: in which order a step goes through the layers, so that the second pass finds them in the caches ------

  // Elements of the chunks before the c-th.
  int64_t numel_before(int c) const { return c == 0 ? 0 : cumulative_[c - 1]; }
  int64_t numel_of(Chunks chunks) const { return numel_before(chunks.end) - numel_before(chunks.begin); }

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
    const int64_t alone = std::min(third_level_cache_bytes() / 2 / num_threads / bytes, total_numel() / num_threads / 8);
    const int64_t thread_numel = second_level_cache_bytes() * 3 / 4 / (bytes + 4);
    auto add = [&](std::vector<Chunks>& list, Chunks layer, int64_t limit) {
      if (!list.empty() && list.back().end == layer.begin && numel_of({list.back().begin, layer.end}) <= limit) {
        list.back().end = layer.end;
      } else {
        list.push_back(layer);
      }
    };
    for (int l = 0; l < num_spans(); ++l) {
      const Chunks layer{first_chunks_[l], first_chunks_[l + 1]};
      if (layer.begin == layer.end) continue;
      const bool is_alone = numel_of(layer) <= alone;
      add(is_alone ? batches_ : waves_, layer, is_alone ? thread_numel : num_threads * thread_numel);
    }
    // from the largest to the smallest, so that the threads end together
    std::stable_sort(batches_.begin(), batches_.end(), [&](Chunks a, Chunks b) { return numel_of(a) > numel_of(b); });
  }

  Lookup lookup_;
  Rule rule_;
  std::vector<Treatment> treatments_;
  bool may_overwrite_grads_;
  bool is_fp64_ = false, keeps_in_grads_ = false;  // of this call
  std::vector<Layer> layers_;                      // one a span
  std::vector<int64_t> tensors_, starts_, rows_;   // of each span
  std::vector<int64_t> empty_rows_;                // layers without an element here
  std::vector<int> first_chunks_;                  // of each span, and the end
  std::vector<int> layers_of_chunks_;              // [num_chunks] number of the span
  std::vector<int64_t> cumulative_;                // [num_chunks] elements up to each chunk's end
  int num_sums_;                                   // of weights and directions
  std::vector<double> sums_;                       // [num_chunks, num_sums]
  std::vector<double> grad_sums_, grad_norms_;     // of each chunk and span, for rules that ask for them
  int scheduled_for_ = 0;                          // threads
  std::vector<Chunks> waves_;    // one after the other: all threads do the first pass, wait for each other, do the second
  std::vector<Chunks> batches_;  // each by one thread
};

}  // namespace largebatch
