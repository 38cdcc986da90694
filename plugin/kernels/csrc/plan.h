// The plan of a kernel call: what lies where, which thread does what when.
//
// A fused step goes through the layers in waves whose memory fits into the second-level caches: first pass, a barrier,
// trust ratios, second pass over what the caches still hold. Sums are taken chunk by chunk in a fixed order, so that
// neither the number of threads nor the waves change a bit.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <optional>
#include <vector>

#include "headers.h"
#include "instruction_sets.h"
#include "passes.h"
#include "tensors.h"
#include "threads.h"
#include "trust_ratio.h"

namespace largebatch {

struct Chunk {
  int layer;
  int64_t begin, end;
};

class Plan {
 public:
  Plan(std::vector<at::Tensor> weights, std::vector<std::vector<at::Tensor>> states, std::vector<at::Tensor> steps,
       const std::vector<std::array<int64_t, 5>>& spans, std::vector<double> weight_decays,
       std::vector<double> decoupled_weight_decays, std::vector<bool> are_adapted, std::vector<uint32_t> seeds,
       const py::dict& rule, bool may_overwrite_grads)
      : weights_(std::move(weights)),
        states_(std::move(states)),
        steps_(std::move(steps)),
        weight_decays_(std::move(weight_decays)),
        decoupled_weight_decays_(std::move(decoupled_weight_decays)),
        are_adapted_(std::move(are_adapted)),
        seeds_(std::move(seeds)),
        may_overwrite_grads_(may_overwrite_grads) {
    read(rule);
    for (const auto& weight : weights_) {
      dtypes_.push_back(weight.scalar_type());
      sizes_.push_back(weight.sizes().vec());
    }
    for (const auto& [tensor, start, numel, row, layer_start] : spans) {
      Layer layer{};
      layer.numel = numel;
      layer.layer_start = layer_start;
      tensors_.push_back(tensor);
      starts_.push_back(start);
      rows_.push_back(row);
      first_chunks_.push_back(static_cast<int>(chunks_.size()));
      for (int64_t begin = 0; begin < numel; begin += chunk_numel) {
        chunks_.push_back({static_cast<int>(layers_.size()), begin, std::min(begin + chunk_numel, numel)});
        cumulative_.push_back(total_numel_ += chunks_.back().end - begin);
      }
      layers_.push_back(layer);
    }
    first_chunks_.push_back(static_cast<int>(chunks_.size()));
    std::vector<bool> has_span(weight_decays_.size(), false);
    for (int64_t row : rows_) has_span[row] = true;
    for (int64_t row = 0; row < static_cast<int64_t>(weight_decays_.size()); ++row)
      if (!has_span[row]) empty_rows_.push_back(row);
    sums_.resize(2 * chunks_.size());
  }

  // Whether nothing has been exchanged behind the tensors that the plan was made for.
  bool is_current() const {
    std::atomic<bool> is{true};
    in_parallel_ranges(weights_.size(), [&](size_t begin, size_t end) {
      for (size_t i = begin; i < end; ++i) {
        prefetch_ahead(weights_, i);
        const at::Tensor& weight = weights_[i];
        if (!weight.is_cpu() || weight.scalar_type() != dtypes_[i] || weight.sizes() != sizes_[i]) is = false;
      }
    });
    return is;
  }

  // Whether weights and states still lie densely in memory and alike, so that they can be taken as flat arrays.
  bool is_flat() const {
    std::atomic<bool> is{true};
    in_parallel_ranges(weights_.size(), [&](size_t begin, size_t end) {
      for (size_t i = begin; i < end; ++i) {
        if (i + headers_ahead < end)
          for (const auto& state : states_[i + headers_ahead]) prefetch_header(state);
        if (!weights_[i].is_non_overlapping_and_dense()) is = false;
        for (const auto& state : states_[i])
          if (!are_laid_out_alike(state, weights_[i])) is = false;
      }
    });
    return is;
  }

  at::Tensor accumulate(const py::list& grads, double grad_scale) {
    const Gradients gradients(grads, weights_);
    take(gradients, grad_scale);
    const auto num_layers = static_cast<int64_t>(weight_decays_.size());
    at::Tensor sums = at::zeros({num_layers, 2}, at::kDouble);
    {
      py::gil_scoped_release release;
      const int num_threads = num_threads_for(total_numel_);
      in_parallel(num_threads, [&](int thread, int team) {
        const auto [begin, end] = share(0, static_cast<int>(chunks_.size()), thread, team);
        for (int c = begin; c < end; ++c) first(c, in_grad(c));
      });
      double* out = sums.data_ptr<double>();
      for (size_t l = 0; l < layers_.size(); ++l) layer_sums(static_cast<int>(l), out + 2 * rows_[l]);
    }
    return sums;
  }

  void advance(const py::list& grads, double grad_scale, double lr, const at::Tensor& ratios,
               const at::Tensor& weight_decays, const std::optional<at::Tensor>& shrinkage, const at::Tensor& is_finite) {
    const Gradients gradients(grads, weights_);
    take(gradients, grad_scale);
    const at::Tensor ratios64 = ratios.to(at::kDouble).contiguous();
    const double* ratio = ratios64.data_ptr<double>();
    const double* decay = weight_decays.data_ptr<double>();
    const double* shrink = shrinkage ? shrinkage->data_ptr<double>() : nullptr;
    const bool* good = is_finite.data_ptr<bool>();
    py::gil_scoped_release release;
    for (size_t l = 0; l < layers_.size(); ++l) {
      const int64_t row = rows_[l];
      set_ratio(layers_[l].scalars, lr, ratio[row], decay[row], shrink ? shrink[row] : 1.0);
    }
    const int num_threads = num_threads_for(total_numel_);
    in_parallel(num_threads, [&](int thread, int team) {
      const auto [begin, end] = share(0, static_cast<int>(chunks_.size()), thread, team);
      for (int c = end - 1; c >= begin; --c)
        if (good[rows_[chunks_[c].layer]]) second(c, layers_[chunks_[c].layer], in_grad(c));
    });
  }

  // A whole step. Returns [5, num_layers] fp64: weight norm, direction norm, trust ratio, local learning rate, weight
  // decay in force; and [num_layers] bool, whether the layer moved.
  std::tuple<at::Tensor, at::Tensor> step(const py::list& grads, double grad_scale, double lr) {
    const Gradients gradients(grads, weights_);
    take(gradients, grad_scale);
    const auto num_layers = static_cast<int64_t>(weight_decays_.size());
    at::Tensor figures = at::zeros({5, num_layers}, at::kDouble);
    at::Tensor moved = at::ones({num_layers}, at::kBool);
    double* out = figures.data_ptr<double>();
    bool* good = moved.data_ptr<bool>();
    py::gil_scoped_release release;
    const double nothing[2] = {0.0, 0.0};
    Layer empty{};
    for (int64_t row : empty_rows_) decide(empty, row, nothing, lr, out, num_layers);
    const int num_threads = num_threads_for(total_numel_);
    const std::vector<int>& waves = waves_for(num_threads);
    in_parallel(num_threads, [&](int thread, int team) {
      for (size_t wave = 0; wave + 1 < waves.size(); ++wave) {
        const auto [begin, end] = share(waves[wave], waves[wave + 1], thread, team);
        // the direction of the chunks that the second pass takes up first is kept aside, as far as there is room
        const int64_t room = std::max<int64_t>(static_cast<int64_t>(scratch_.size()) / team / bytes_of_chunk(), 0);
        char* const scratch = scratch_.data() + thread * room * bytes_of_chunk();
        auto kept = [&](int c) -> void* {
          if (keeps_in_grads_ || end - c > room) return in_grad(c);
          return scratch + (end - 1 - c) * bytes_of_chunk();
        };
        for (int c = begin; c < end; ++c) first(c, kept(c));
        if (cuts_a_layer(waves[wave], waves[wave + 1], team)) barrier(team);
        int current = -1;
        bool is_good = false;
        Layer layer{};
        for (int c = end - 1; c >= begin; --c) {
          const int l = chunks_[c].layer;
          if (l != current) {
            current = l;
            layer = layers_[l];
            double found[2];
            layer_sums(l, found);
            // every thread that has a part of the layer computes the same; the owner of the first chunk reports it
            const bool is_reporter = begin <= first_chunks_[l];
            is_good = decide(layer, rows_[l], found, lr, is_reporter ? out : nullptr, num_layers);
            if (is_reporter) good[rows_[l]] = is_good;
          }
          if (is_good) second(c, layer, kept(c));
        }
      }
    });
    return {figures, moved};
  }

 private:
  void read(const py::dict& rule) {
    auto number = [&](const char* name, double otherwise) {
      return rule.contains(name) ? rule[name].cast<double>() : otherwise;
    };
    auto truth = [&](const char* name, bool otherwise) { return rule.contains(name) ? rule[name].cast<bool>() : otherwise; };
    auto bounds = [&](const char* name, bool& has, double* values) {
      if (!rule.contains(name) || rule[name].is_none()) return;
      const auto pair = rule[name].cast<std::pair<double, double>>();
      has = true;
      values[0] = pair.first;
      values[1] = pair.second;
    };
    rule_.algorithm = static_cast<Algorithm>(rule["algorithm"].cast<int>());
    rule_.beta1 = number("beta1", 0), rule_.beta2 = number("beta2", 0), rule_.eps = number("eps", 0);
    rule_.momentum = number("momentum", 0), rule_.trust_coefficient = number("trust_coefficient", 1);
    rule_.bias_correction = truth("bias_correction", false);
    rule_.bias_correction_in_lr = truth("bias_correction_in_lr", false);
    rule_.nesterov = truth("nesterov", false), rule_.lr_in_momentum = truth("lr_in_momentum", true);
    rule_.larc_clip = truth("larc_clip", false), rule_.decay_in_ratio = truth("decay_in_ratio", true);
    rule_.damp_ratio_by_momentum = truth("damp_ratio_by_momentum", false);
    rule_.skip_zero_norm_layers = truth("skip_zero_norm_layers", false);
    bounds("weight_norm_bounds", rule_.has_weight_norm_bounds, rule_.weight_norm_bounds);
    bounds("trust_ratio_bounds", rule_.has_trust_ratio_bounds, rule_.trust_ratio_bounds);
  }

  // Addresses and scalars of this step.
  void take(const Gradients& grads, double grad_scale) {
    step_at_.resize(steps_.size());
    in_parallel_ranges(steps_.size(), [&](size_t begin, size_t end) {
      for (size_t i = begin; i < end; ++i) {
        prefetch_ahead(steps_, i);
        step_at_[i] = steps_[i].data_ptr<float>();
        __builtin_prefetch(step_at_[i]);
      }
    });
    std::atomic<bool> can_keep{rule_.algorithm >= Algorithm::lamb}, keeps_in_grads{may_overwrite_grads_};
    is_fp64_ = !weights_.empty() && weights_[0].scalar_type() == at::kDouble;  // a call has weights of one type
    in_parallel_ranges(layers_.size(), [&](size_t begin, size_t end) {
      double last_step = -1;
      Scalars common{};
      for (size_t l = begin; l < end; ++l) {
        if (l + headers_ahead < end) prefetch_storages(tensors_[l + headers_ahead]);
        Layer& layer = layers_[l];
        const int64_t t = tensors_[l];
        const double step = steps_.empty() ? 0.0 : static_cast<double>(*step_at_[t]) + 1.0;
        if (step != last_step) common = scalars_of(last_step = step, grad_scale);
        layer.scalars = common;
        layer.scalars.weight_decay = weight_decays_[rows_[l]];
        layer.rounding_key = rounding_key(seeds_[rows_[l]], step);
        place(layer, weights_[t], grads[t], states_[t], starts_[l]);
        if (layer.state_dtype == Dtype::bf16) can_keep = false;
        // not through a copy of the gradient, which would not be there in the second pass of a step in two calls
        if (layer.grad_dtype != (is_fp64_ ? Dtype::fp64 : Dtype::fp32) || grads.is_copy(t)) keeps_in_grads = false;
      }
    });
    can_keep_ = can_keep;
    keeps_in_grads_ = keeps_in_grads && can_keep_;
    if (can_keep_ && !keeps_in_grads_ && scratch_.empty()) scratch_.resize(total_numel_ * bytes_of_element() / 100);
  }

  void place(Layer& layer, const at::Tensor& weight, const at::Tensor& grad, const std::vector<at::Tensor>& states,
             int64_t start) const {
    layer.weight = at_element(weight, start);
    layer.grad = at_element(grad, start);
    for (size_t s = 0; s < states.size(); ++s) layer.state[s] = at_element(states[s], start);
    layer.weight_dtype = dtype_of(weight);
    layer.grad_dtype = dtype_of(grad);
    layer.state_dtype = dtype_of(states[0]);
    TORCH_CHECK((layer.weight_dtype == Dtype::fp64) == is_fp64_ && (layer.grad_dtype == Dtype::fp64) == is_fp64_ &&
                    (layer.state_dtype == Dtype::fp64) == is_fp64_,
                "fp64 weights go with fp64 gradients and state, all others with fp32, bf16 or fp16 ones");
  }

  // Of a tensor and its state, whose own headers is_flat has looked at.
  void prefetch_storages(int64_t t) const {
    prefetch_storage(weights_[t]);
    for (const auto& state : states_[t]) prefetch_storage(state);
  }

  int64_t bytes_of_element() const { return is_fp64_ ? 8 : 4; }
  int64_t bytes_of_chunk() const { return chunk_numel * bytes_of_element(); }

  // The chunk's gradient, if the direction may take its place.
  void* in_grad(int c) const {
    if (!keeps_in_grads_) return nullptr;
    const void* grad = layers_[chunks_[c].layer].grad;
    return static_cast<char*>(const_cast<void*>(grad)) + chunks_[c].begin * bytes_of_element();
  }

  Scalars scalars_of(double step, double grad_scale) const {
    Scalars s{};
    s.grad_scale = grad_scale;
    s.beta1 = rule_.beta1, s.beta2 = rule_.beta2, s.eps = rule_.eps, s.momentum = rule_.momentum;
    s.is_nesterov = rule_.nesterov;
    s.shrinkage = 1.0, s.step_size = 1.0;
    s.m_in_m_hat = 1.0, s.v_in_v_hat = 1.0;
    if (rule_.algorithm == Algorithm::lamb) {
      const double rest1 = 1.0 - std::pow(rule_.beta1, step), rest2 = 1.0 - std::pow(rule_.beta2, step);
      if (rule_.bias_correction) s.m_in_m_hat = 1.0 / rest1, s.v_in_v_hat = 1.0 / rest2;
      if (rule_.bias_correction_in_lr) s.step_size = std::sqrt(rest2) / rest1;
    } else if (rule_.algorithm == Algorithm::nlamb || rule_.algorithm == Algorithm::nnlamb) {
      s.m_in_m_hat = rule_.beta1 / (1.0 - std::pow(rule_.beta1, step + 1));
      s.grad_in_m_hat = (1.0 - rule_.beta1) / (1.0 - std::pow(rule_.beta1, step));
      const bool looks_ahead = rule_.algorithm == Algorithm::nnlamb;
      s.v_in_v_hat = rule_.beta2 / (1.0 - std::pow(rule_.beta2, looks_ahead ? step + 1 : step));
      s.grad_in_v_hat = looks_ahead ? (1.0 - rule_.beta2) / (1.0 - std::pow(rule_.beta2, step)) : 0.0;
    }
    return s;
  }

  static uint32_t rounding_key(uint32_t seed, double step) {
    uint32_t x = seed + static_cast<uint32_t>(static_cast<int64_t>(step));
    x ^= x >> 16;
    x *= 0x85EBCA6Bu;
    x ^= x >> 13;
    x *= 0xC2B2AE35u;
    return x ^ x >> 16;
  }

  double local_lr(double lr, double ratio) const {
    return is_fp64_ ? lr * ratio : static_cast<float>(lr) * static_cast<float>(ratio);
  }

  // Once the ratio is known. step_size comes in as the bias correction that belongs to the learning rate.
  void set_ratio(Scalars& s, double lr, double ratio, double weight_decay, double shrinkage) const {
    s.weight_decay = weight_decay;
    s.shrinkage = shrinkage;
    const double corrected = lr * s.step_size;
    s.step_size = is_fp64_ ? corrected * ratio : static_cast<float>(corrected) * static_cast<float>(ratio);
    s.inside = rule_.lr_in_momentum ? local_lr(lr, ratio) : ratio;
    s.outside = rule_.lr_in_momentum ? 1.0 : lr;
  }

  // Trust ratio of a layer from its sums of squares; false if the layer must not move.
  bool decide(Layer& layer, int64_t row, const double* sums, double lr, double* out, int64_t num_layers) const {
    const double shrinkage = decoupled_weight_decays_[row] != 0.0 ? 1.0 - lr * decoupled_weight_decays_[row] : 1.0;
    double weight_norm = std::sqrt(sums[0]);
    if (shrinkage != 1.0) weight_norm *= std::abs(shrinkage);
    const double direction_norm = std::sqrt(sums[1]);
    const double decay = weight_decays_[row];
    double ratio = are_adapted_[row] ? trust_ratio(rule_, weight_norm, direction_norm, lr, decay) : 1.0;
    if (!is_fp64_) ratio = static_cast<float>(ratio);  // rounded once, here
    const bool is_defined = weight_norm > 0 && direction_norm > 0;
    const double decay_in_force = rule_.skip_zero_norm_layers && !is_defined ? 0.0 : decay;
    if (out) {
      out[row] = weight_norm;
      out[num_layers + row] = direction_norm;
      out[2 * num_layers + row] = ratio;
      out[3 * num_layers + row] = local_lr(lr, ratio);
      out[4 * num_layers + row] = decay_in_force;
    }
    set_ratio(layer.scalars, lr, ratio, decay_in_force, shrinkage);
    return std::isfinite(sums[0]) && std::isfinite(sums[1]);
  }

  void first(int c, void* kept) {
    const Chunk& chunk = chunks_[c];
    passes_in_use()->first(rule_.algorithm, is_fp64_, layers_[chunk.layer], chunk.begin, chunk.end, &sums_[2 * c], kept);
  }

  void second(int c, const Layer& layer, const void* kept) const {
    passes_in_use()->second(rule_.algorithm, is_fp64_, layer, chunks_[c].begin, chunks_[c].end, kept);
  }

  void layer_sums(int l, double* out) const {
    out[0] = out[1] = 0.0;
    for (int c = first_chunks_[l]; c < first_chunks_[l + 1]; ++c) {
      out[0] += sums_[2 * c];
      out[1] += sums_[2 * c + 1];
    }
  }

  // The chunks in [begin, end) that a thread takes: neighbours, of about equal size.
  std::pair<int, int> share(int begin, int end, int thread, int team) const {
    return {cut(begin, end, thread, team), cut(begin, end, thread + 1, team)};
  }

  // The first chunk of a thread in [begin, end). Small layers are not cut, so that nobody has to wait for their sums.
  int cut(int begin, int end, int thread, int team) const {
    if (thread == 0) return begin;
    if (thread == team) return end;
    const int64_t before = begin == 0 ? 0 : cumulative_[begin - 1];
    const int64_t numel = (end == 0 ? 0 : cumulative_[end - 1]) - before;
    const auto chunk = static_cast<int>(std::lower_bound(cumulative_.begin() + begin, cumulative_.begin() + end,
                                                         before + numel * thread / team) -
                                        cumulative_.begin());
    if (chunk == end) return end;
    const int layer = chunks_[chunk].layer;
    return layers_[layer].numel * 16 * team <= numel ? std::max(first_chunks_[layer], begin) : chunk;
  }

  // Whether two threads have a part of one layer among the chunks in [begin, end).
  bool cuts_a_layer(int begin, int end, int team) const {
    for (int thread = 1; thread < team; ++thread) {
      const int first_chunk = cut(begin, end, thread, team);
      if (first_chunk > begin && first_chunk < end &&
          chunks_[first_chunk].layer == chunks_[first_chunk - 1].layer)
        return true;
    }
    return false;
  }

  // Chunk numbers at which waves begin, for as much memory as the threads' caches hold; whole layers only.
  const std::vector<int>& waves_for(int num_threads) {
    if (wave_threads_ == num_threads) return waves_;
    const int64_t bytes = 16;  // an element's weight, gradient and state, in fp32
    const int64_t wave_numel = num_threads * second_level_cache_bytes() * 3 / 4 / bytes;
    waves_.assign(1, 0);
    int64_t filled = 0;
    for (size_t l = 0; l < layers_.size(); ++l) {
      if (filled > 0 && filled + layers_[l].numel > wave_numel) {
        waves_.push_back(first_chunks_[l]);
        filled = 0;
      }
      filled += layers_[l].numel;
    }
    waves_.push_back(static_cast<int>(chunks_.size()));
    wave_threads_ = num_threads;
    return waves_;
  }

  std::vector<at::Tensor> weights_;
  std::vector<at::ScalarType> dtypes_;
  std::vector<std::vector<int64_t>> sizes_;
  std::vector<std::vector<at::Tensor>> states_;
  std::vector<at::Tensor> steps_;
  std::vector<float*> step_at_;  // in this step
  std::vector<double> weight_decays_, decoupled_weight_decays_;
  std::vector<bool> are_adapted_;
  std::vector<uint32_t> seeds_;
  bool may_overwrite_grads_;
  Rule rule_{};
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
  std::vector<double> sums_;                       // [num_chunks, 2]
  std::vector<int> waves_;
  int wave_threads_ = 0;
};

}  // namespace largebatch
