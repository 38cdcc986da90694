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
#include <vector>

#include "chunk_queues.h"
#include "instruction_sets.h"
#include "lookup.h"
#include "passes.h"
#include "rule.h"
#include "schedule.h"
#include "threads.h"

namespace largebatch {

struct Chunk {
  int layer, index;  // the index-th chunk_numel elements of the layer
};

// How a layer is to be treated, by its number in Python.
struct Treatment {
  double weight_decay, decoupled_weight_decay;
  uint32_t seed;
  bool is_adapted;
};

class Plan {
 public:
  Plan(std::vector<at::Tensor> weights, const std::vector<std::vector<at::Tensor>>& states, std::vector<at::Tensor> steps,
       const std::vector<std::array<int64_t, 5>>& spans, const std::vector<double>& weight_decays,
       const std::vector<double>& decoupled_weight_decays, const std::vector<bool>& are_adapted,
       const std::vector<uint32_t>& seeds, const std::string& rule, const py::dict& options,
       bool may_overwrite_grads)
      : lookup_(std::move(weights), states, std::move(steps)),
        may_overwrite_grads_(may_overwrite_grads),
        rule_(rule_of(rule, options)) {
    for (size_t row = 0; row < weight_decays.size(); ++row)
      treatments_.push_back({weight_decays[row], decoupled_weight_decays[row], seeds[row], are_adapted[row]});
    // short layers side by side, so that a thread has many of them in a row and asks for each in time
    std::vector<std::array<int64_t, 5>> ordered = spans;
    std::stable_partition(ordered.begin(), ordered.end(), [](const auto& span) { return span[2] >= chunk_numel; });
    for (const auto& [tensor, start, numel, row, layer_start] : ordered) {
      Layer layer{};
      layer.numel = numel;
      layer.layer_start = layer_start;
      tensors_.push_back(tensor);
      starts_.push_back(start);
      rows_.push_back(row);
      first_chunks_.push_back(static_cast<int>(chunks_.size()));
      for (int64_t begin = 0; begin < numel; begin += chunk_numel) {
        chunks_.push_back({static_cast<int>(layers_.size()), static_cast<int>(begin / chunk_numel)});
        cumulative_.push_back(total_numel_ += std::min(chunk_numel, numel - begin));
      }
      layers_.push_back(layer);
    }
    first_chunks_.push_back(static_cast<int>(chunks_.size()));
    std::vector<bool> has_span(treatments_.size(), false);
    for (int64_t row : rows_) has_span[row] = true;
    for (size_t row = 0; row < treatments_.size(); ++row)
      if (!has_span[row]) empty_rows_.push_back(static_cast<int64_t>(row));
    num_sums_ = 1 + num_directions_of(rule_);
    sums_.resize(num_sums_ * chunks_.size());
    if (normalises_gradients(rule_)) grad_sums_.resize(chunks_.size()), grad_norms_.resize(layers_.size());
  }

  // See Lookup.
  bool look_up(const py::object& grads) { return lookup_.renew(grads); }
  std::optional<TensorList> find_gradients() {
    TensorList grads;
    return lookup_.find_gradients(grads.tensors) ? std::optional(std::move(grads)) : std::nullopt;
  }
  bool is_flat() const { return lookup_.is_flat(); }
  void count() { lookup_.count(); }

  // [num_layers, 1] fp64: sums of the squares of the gradients.
  at::Tensor sums_before(const py::object& grads, double grad_scale) {
    const std::vector<at::Tensor> copies = take(grads, grad_scale);
    at::Tensor sums = at::zeros({static_cast<int64_t>(treatments_.size()), 1}, at::kDouble);
    py::gil_scoped_release release;
    for_each_chunk(static_cast<int>(chunks_.size()), num_threads_for(total_numel_), [&](int c) { add_gradients(c); });
    for (size_t l = 0; l < layers_.size(); ++l) sums.data_ptr<double>()[rows_[l]] = grad_sum(static_cast<int>(l));
    return sums;
  }

  // grad_norms: [num_layers] of whole layers, and whether their sums were finite; null for rules that do not ask.
  at::Tensor accumulate(const py::object& grads, double grad_scale, const std::optional<at::Tensor>& grad_norms,
                        const std::optional<at::Tensor>& are_finite) {
    const std::vector<at::Tensor> copies = take(grads, grad_scale);
    take_norms(grad_norms, are_finite);
    const auto num_layers = static_cast<int64_t>(treatments_.size());
    at::Tensor sums = at::zeros({num_layers, num_sums_}, at::kDouble);
    {
      py::gil_scoped_release release;
      for_each_chunk(static_cast<int>(chunks_.size()), num_threads_for(total_numel_),
                     [&](int c) { first(c, in_grad(c), std::nullopt); });
      double* out = sums.data_ptr<double>();
      for (size_t l = 0; l < layers_.size(); ++l) layer_sums(static_cast<int>(l), out + num_sums_ * rows_[l]);
    }
    return sums;
  }

  // ratios: [num_layers, 1] or [num_layers, 2].
  void advance(const py::object& grads, double grad_scale, double lr, const at::Tensor& ratios,
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
    for (size_t l = 0; l < layers_.size(); ++l) {
      const int64_t row = rows_[l];
      set_ratios(layers_[l].scalars, rule_, is_fp64_, lr, ratio + (num_sums_ - 1) * row, decay[row],
                 shrink ? shrink[row] : 1.0);
    }
    const auto num_chunks = static_cast<int>(chunks_.size());
    for_each_chunk(num_chunks, num_threads_for(total_numel_), [&](int i) {
      const int c = num_chunks - 1 - i;  // the last are still in the cache
      if (good[rows_[chunks_[c].layer]]) second(c, layers_[chunks_[c].layer], in_grad(c), std::nullopt);
    });
  }

  // A whole step. Returns [num_figures, num_layers] fp64, the rows of largebatch.telemetry.LayerStats; [num_layers] bool,
  // whether the layer moved; and whether all have.
  std::tuple<at::Tensor, at::Tensor, bool> step(const py::object& grads, double grad_scale, double lr) {
    const std::vector<at::Tensor> copies = take(grads, grad_scale);
    const auto num_layers = static_cast<int64_t>(treatments_.size());
    at::Tensor figures = at::zeros({num_layers, num_figures()}, at::kDouble);
    at::Tensor moved = at::ones({num_layers}, at::kBool);
    double* out = figures.data_ptr<double>();
    bool* good = moved.data_ptr<bool>();
    py::gil_scoped_release release;
    const double nothing[1 + max_num_directions] = {};
    Layer empty{};
    for (int64_t row : empty_rows_) decide(empty, row, nothing, 0.0, lr, out);
    const int num_threads = num_threads_for(total_numel_);
    make_schedule(num_threads);
    const std::vector<Chunks>&waves = schedule_.waves, &batches = schedule_.batches;
    const int num_waves = static_cast<int>(waves.size()), num_batches = static_cast<int>(batches.size());
    ChunkQueues queues(num_threads);
    std::atomic<int> next_batch{0};
    in_parallel(num_threads, [&](int thread, int team) {
      std::vector<int>& done = done_[thread];
      done.clear();
      // the direction of the chunks that the second pass takes up first is kept aside, as far as there is room
      const int64_t room = static_cast<int64_t>(scratch_.size()) / team / bytes_of_chunk();
      char* const scratch = scratch_.data() + thread * room * bytes_of_chunk();
      auto kept = [&](int c, Chunks own) -> void* {
        if (keeps_in_grads_) return in_grad(c);
        const bool has_room = c >= own.begin && c < own.end && own.end - c <= room;
        return has_room ? scratch + (own.end - 1 - c) * bytes_of_chunk() : nullptr;
      };
      auto first_pass = [&](int c, Chunks own) {
        std::optional<Upcoming> upcoming;
        if (is_short(c)) upcoming = after_first(c, own.end);
        first(c, kept(c, own), upcoming);
        done.push_back(c);
      };
      auto second_passes = [&](Chunks own, int comes_next) {
        int current = -1;
        bool is_good = false;
        Layer layer{};
        double found[1 + max_num_directions];
        for (auto c = done.rbegin(); c != done.rend(); ++c) {  // the last are still in the cache
          const int l = chunks_[*c].layer;
          // every thread that has a part of the layer computes the same; the one with its first chunk reports it
          const bool is_reporter = *c == first_chunks_[l];
          if (l != current) layer_sums(l, found);
          if (l != current || is_reporter) {
            layer = layers_[l];
            const double grad_norm = grad_norms_.empty() ? 0.0 : grad_norms_[l];
            is_good = decide(layer, rows_[l], found, grad_norm, lr, is_reporter ? out : nullptr);
            if (is_reporter) good[rows_[l]] = is_good;
            current = l;
          }
          if (!is_good) continue;
          std::optional<Upcoming> upcoming;
          if (is_short(*c)) upcoming = c + 1 != done.rend() ? end_of(c[1]) : at(comes_next, second_ahead_if_short);
          second(*c, layer, kept(*c, own), upcoming);
        }
        done.clear();
      };
      auto own_of = [&](int wave) { return share_of(waves[wave], cumulative_, thread, team); };
      auto fill = [&](int wave) {
        if (wave == num_waves) return;
        const Chunks own = own_of(wave);
        queues.fill(wave % ChunkQueues::num_sets, thread, own.begin, own.end);
      };
      fill(0);
      barrier(team);
      for (int wave = 0; wave < num_waves; ++wave) {
        const Chunks own = own_of(wave);
        if (normalises_gradients(rule_)) {
          for (int c = own.begin; c < own.end; ++c) add_gradients(c);
          barrier(team);
          find_grad_norms(waves[wave], thread, team);
          barrier(team);
        }
        for (Chunks taken; !(taken = queues.take(wave % ChunkQueues::num_sets, thread, team)).empty();)
          for (int c = taken.begin; c < taken.end; ++c) first_pass(c, own);
        fill(wave + 1);
        barrier(team);
        second_passes(own, waves[std::min(wave + 1, num_waves - 1)].begin);
      }
      for (int batch; (batch = next_batch.fetch_add(1, std::memory_order_relaxed)) < num_batches;) {
        if (normalises_gradients(rule_)) {
          for (int c = batches[batch].begin; c < batches[batch].end; ++c) add_gradients(c);
          find_grad_norms(batches[batch], 0, 1);
        }
        for (int c = batches[batch].begin; c < batches[batch].end; ++c) first_pass(c, batches[batch]);
        second_passes(batches[batch], batches[std::min(batch + team, num_batches - 1)].begin);
      }
    });
    return {figures.t(), moved, std::all_of(good, good + num_layers, [](bool is) { return is; })};
  }

 private:
  // Addresses, as looked up, and scalars of this step; and what they need to live as long as the call.
  std::vector<at::Tensor> take(const py::object& grads, double grad_scale) {
    std::vector<at::Tensor> copies = lookup_.lay_out(grads);
    const std::vector<Place>& places = lookup_.places();
    const bool counts_steps = lookup_.counts_steps();
    std::atomic<bool> can_keep{keeps_directions()}, keeps_in_grads{may_overwrite_grads_};
    is_fp64_ = !places.empty() && places[0].weight_dtype == Dtype::fp64;  // a call has weights of one type
    in_parallel_ranges(layers_.size(), [&](size_t begin, size_t end) {
      double last_step = -1;
      Scalars common{};
      for (size_t l = begin; l < end; ++l) {
        Layer& layer = layers_[l];
        const Place& place = places[tensors_[l]];
        if (counts_steps && l + headers_ahead < end) __builtin_prefetch(places[tensors_[l + headers_ahead]].step);
        const double step = counts_steps ? static_cast<double>(*place.step) + 1.0 : 0.0;
        if (step != last_step) common = scalars_of(rule_, last_step = step, grad_scale);
        layer.scalars = common;
        layer.scalars.weight_decay = treatments_[rows_[l]].weight_decay;
        layer.scalars.decay_in_direction = rule_.decay_before_norm ? layer.scalars.weight_decay : 0.0;
        layer.rounding_key = rounding_key(treatments_[rows_[l]].seed, step);
        set(layer, place, starts_[l]);
        if (layer.state_dtype == Dtype::bf16) can_keep = false;
        // not through a copy of the gradient, which would not be there in the second pass of a step in two calls
        if (layer.grad_dtype != (is_fp64_ ? Dtype::fp64 : Dtype::fp32) || !place.is_grad_alike) keeps_in_grads = false;
      }
    });
    can_keep_ = can_keep;
    keeps_in_grads_ = keeps_in_grads && can_keep_;
    if (can_keep_ && !keeps_in_grads_ && scratch_.empty()) scratch_.resize(total_numel_ * bytes_of_element() / 100);
    return copies;
  }

  void set(Layer& layer, const Place& place, int64_t start) const {
    layer.weight = place.weight + start * size_of(place.weight_dtype);
    layer.grad = place.grad + start * size_of(place.grad_dtype);
    for (int s = 0; s < 2; ++s) layer.state[s] = place.state[s] + start * size_of(place.state_dtype);
    layer.weight_dtype = place.weight_dtype;
    layer.grad_dtype = place.grad_dtype;
    layer.state_dtype = place.state_dtype;
  }

  // Whether the second pass can do with the direction alone.
  bool keeps_directions() const { return rule_.algorithm >= Algorithm::lamb && num_directions_of(rule_) == 1; }

  int64_t num_figures() const { return 3 + 2 * num_directions_of(rule_) + (normalises_gradients(rule_) ? 1 : 0); }

  // --- norms of gradients, for rules that renew their state with them ---------------------------------------------------

  void add_gradients(int c) {
    const Layer& layer = layers_[chunks_[c].layer];
    const auto [begin, end] = elements(c, layer);
    grad_sums_[c] = passes_in_use()->square_sum(layer.grad, layer.grad_dtype, is_fp64_, layer.scalars.grad_scale, begin, end);
  }

  double grad_sum(int l) const {
    double sum = 0.0;
    for (int c = first_chunks_[l]; c < first_chunks_[l + 1]; ++c) sum += grad_sums_[c];
    return sum;
  }

  void set_grad_norm(Layer& layer, double norm, bool is_finite) const {
    layer.scalars.grad_norm = !is_finite ? std::nan("") : norm > 0 ? norm : 1.0;
  }

  // Of every team-th layer of these, which are all there.
  void find_grad_norms(Chunks chunks, int thread, int team) {
    for (int l = chunks_[chunks.begin].layer + thread; l <= chunks_[chunks.end - 1].layer; l += team) {
      const double sum = grad_sum(l), norm = grad_norms_[l] = std::sqrt(sum);
      set_grad_norm(layers_[l], is_fp64_ ? norm : static_cast<float>(norm), std::isfinite(sum));
    }
  }

  void take_norms(const std::optional<at::Tensor>& grad_norms, const std::optional<at::Tensor>& are_finite) {
    if (!grad_norms) return;
    const at::Tensor norms = grad_norms->to(at::kDouble).contiguous();
    for (size_t l = 0; l < layers_.size(); ++l)
      set_grad_norm(layers_[l], norms.data_ptr<double>()[rows_[l]], are_finite->data_ptr<bool>()[rows_[l]]);
  }

  int64_t bytes_of_element() const { return is_fp64_ ? 8 : 4; }
  int64_t bytes_of_chunk() const { return chunk_numel * bytes_of_element(); }

  // The chunk's gradient, if the direction may take its place.
  void* in_grad(int c) const {
    if (!keeps_in_grads_) return nullptr;
    const void* grad = layers_[chunks_[c].layer].grad;
    return static_cast<char*>(const_cast<void*>(grad)) + chunks_[c].index * bytes_of_chunk();
  }

  // Trust ratio of a layer from its sums of squares; false if the layer must not move.
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

  std::pair<int64_t, int64_t> elements(int c, const Layer& layer) const {
    const int64_t begin = chunks_[c].index * chunk_numel;
    return {begin, std::min(begin + chunk_numel, layer.numel)};
  }

  // What comes after a chunk's first pass: that of the next one, or at the end of the thread's range the second pass, which
  // begins with the end of the same chunk.
  Upcoming after_first(int c, int end_of_range) const {
    if (c + 1 < end_of_range) return at(c + 1, 0);
    const auto [begin, end] = elements(c, layers_[chunks_[c].layer]);
    const int64_t ahead = rule_.algorithm >= Algorithm::lamb ? first_ahead_of_lamb : first_ahead_of_lars;
    return at(c, std::max(int64_t{0}, end - begin - ahead));
  }

  Upcoming end_of(int c) const {
    const auto [begin, end] = elements(c, layers_[chunks_[c].layer]);
    return at(c, end - begin);
  }

  Upcoming at(int c, int64_t offset) const {
    const Layer& layer = layers_[chunks_[c].layer];
    auto address = [element = chunks_[c].index * chunk_numel + offset](const void* array) {
      return static_cast<const float*>(array) + element;
    };
    return {address(layer.weight), address(layer.grad), {address(layer.state[0]), address(layer.state[1])}};
  }

  // Whether a chunk is all of a layer, and so small that what comes after it has to be asked for.
  bool is_short(int c) const { return layers_[chunks_[c].layer].numel < chunk_numel; }

  void first(int c, void* kept, const std::optional<Upcoming>& upcoming) {
    // a step that streams through memory leaves nothing of all this in the caches
    __builtin_prefetch(chunks_.data() + c + 32);
    __builtin_prefetch(sums_.data() + num_sums_ * (c + 16), 1);
    const Layer& layer = layers_[chunks_[c].layer];
    const auto [begin, end] = elements(c, layer);
    if (begin == 0) {
      __builtin_prefetch(&treatments_[rows_[chunks_[c].layer]]);
      __builtin_prefetch(&layer + 1), __builtin_prefetch(reinterpret_cast<const char*>(&layer + 1) + 64);
    }
    double* const sums = &sums_[num_sums_ * c];
    passes_in_use()->first(rule_.algorithm, is_fp64_, layer, begin, end, sums, kept, upcoming ? &*upcoming : nullptr);
  }

  void second(int c, const Layer& layer, const void* kept, const std::optional<Upcoming>& upcoming) const {
    const auto [begin, end] = elements(c, layer);
    passes_in_use()->second(rule_.algorithm, is_fp64_, layer, begin, end, kept, upcoming ? &*upcoming : nullptr);
  }

  void layer_sums(int l, double* out) const {
    std::fill_n(out, num_sums_, 0.0);
    for (int c = first_chunks_[l]; c < first_chunks_[l + 1]; ++c)
      for (int i = 0; i < num_sums_; ++i) out[i] += sums_[num_sums_ * c + i];
  }

  void make_schedule(int num_threads) {
    if (schedule_.num_threads == num_threads) return;
    schedule_ = schedule_for(first_chunks_, cumulative_, num_threads);
    done_.resize(num_threads);
    for (auto& done : done_) done.reserve(schedule_.longest);
  }

  Lookup lookup_;
  std::vector<Treatment> treatments_;
  bool may_overwrite_grads_;
  Rule rule_;
  bool is_fp64_ = false;
  bool can_keep_ = false, keeps_in_grads_ = false;  // of the direction between the passes
  std::vector<char> scratch_;                       // a hundredth of the parameters' memory
  int64_t total_numel_ = 0;
  std::vector<Layer> layers_;                      // one a span
  std::vector<int64_t> tensors_, starts_, rows_;   // of each span
  std::vector<int64_t> empty_rows_;                // layers without an element here
  std::vector<int> first_chunks_;                  // of each span, and the end
  std::vector<Chunk> chunks_;
  std::vector<int64_t> cumulative_;
  int num_sums_ = 2;                               // of weights and directions
  std::vector<double> sums_;                       // [num_chunks, num_sums]
  std::vector<double> grad_sums_, grad_norms_;     // of each chunk and span, for rules that ask for them
  Schedule schedule_;
  std::vector<std::vector<int>> done_;  // chunks whose first pass a thread has done, and not yet the second
};

}  // namespace largebatch
