// The CPU kernels as a Python module: what lies where, which thread does what when, and the checks at the boundary.
//
// A fused step goes through the layers in waves whose memory fits into the second-level caches: first pass, a barrier,
// trust ratios, second pass over what the caches still hold. Sums are taken chunk by chunk in a fixed order, so that
// neither the number of threads nor the waves change a bit.

#include <torch/extension.h>

#include <unistd.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "passes.h"
#include "trust_ratio.h"

namespace py = pybind11;

namespace largebatch {

// --- instruction sets -----------------------------------------------------------------------------------------------

std::vector<const Passes*> available_passes() {
  std::vector<const Passes*> available;
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  if (passes_avx512() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    available.push_back(passes_avx512());
  if (passes_avx2() && __builtin_cpu_supports("avx2")) available.push_back(passes_avx2());
#endif
  available.push_back(passes_portable());
  return available;
}

const Passes*& passes_in_use() {
  static const Passes* passes = available_passes().front();
  return passes;
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Passes* passes : available_passes()) names.push_back(passes->name);
  return names;
}

void use_instruction_set(const std::string& name) {
  for (const Passes* passes : available_passes()) {
    if (name == passes->name) {
      passes_in_use() = passes;
      return;
    }
  }
  TORCH_CHECK_VALUE(false, "instruction set ", name, " is not available on this processor");
}

// --- threads --------------------------------------------------------------------------------------------------------

int64_t second_level_cache_bytes() {
  static const int64_t bytes = [] {
#ifdef _SC_LEVEL2_CACHE_SIZE
    const long found = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (found > 0) return static_cast<int64_t>(found);
#endif
    return int64_t{1} << 20;
  }();
  return bytes;
}

// Calls work(thread, num_threads) on each thread of a team.
template <class Work>
void in_parallel(int num_threads, Work work) {
#ifdef _OPENMP
  if (num_threads > 1) {
#pragma omp parallel num_threads(num_threads)
    work(omp_get_thread_num(), omp_get_num_threads());
    return;
  }
#endif
  work(0, 1);
}

void barrier(int num_threads) {
#ifdef _OPENMP
  if (num_threads > 1) {
#pragma omp barrier
  }
#endif
  (void)num_threads;
}

// --- tensors --------------------------------------------------------------------------------------------------------

Dtype dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble: return Dtype::fp64;
    case at::kFloat: return Dtype::fp32;
    case at::kBFloat16: return Dtype::bf16;
    case at::kHalf: return Dtype::fp16;
    default: TORCH_CHECK_TYPE(false, "the CPU kernels know fp64, fp32, bf16 and fp16, not ", tensor.scalar_type());
  }
}

bool are_laid_out_alike(const at::Tensor& a, const at::Tensor& b) {
  return a.sizes() == b.sizes() && a.strides() == b.strides();
}

// The same values in the layout of another tensor; the tensor itself if it has that layout already.
at::Tensor laid_out_like(const at::Tensor& values, const at::Tensor& model) {
  if (are_laid_out_alike(values, model)) return values;
  TORCH_CHECK_VALUE(values.sizes() == model.sizes(), "a gradient of shape ", values.sizes(), " for a weight of shape ",
                    model.sizes());
  return at::empty_strided(model.sizes(), model.strides(), values.options()).copy_(values);
}

char* at_element(const at::Tensor& tensor, int64_t element) {
  return static_cast<char*>(tensor.data_ptr()) + element * static_cast<int64_t>(tensor.element_size());
}

int num_threads_for(int64_t numel) {
  // below this a second thread costs more than it gains
  return numel < 32768 ? 1 : at::get_num_threads();
}

// --- one kernel call ------------------------------------------------------------------------------------------------

struct Chunk {
  int layer;
  int64_t begin, end;
};

// Lets go of tensors at the end of a call, so that nobody's memory is kept; declared before the GIL is released.
struct Borrowed {
  std::vector<at::Tensor>& tensors;
  ~Borrowed() { tensors.clear(); }
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
    for (size_t i = 0; i < weights_.size(); ++i)
      if (!weights_[i].is_cpu() || weights_[i].scalar_type() != dtypes_[i] || weights_[i].sizes() != sizes_[i]) return false;
    return true;
  }

  // Whether weights and states still lie densely in memory and alike, so that they can be taken as flat arrays.
  bool is_flat() const {
    for (size_t i = 0; i < weights_.size(); ++i) {
      if (!weights_[i].is_non_overlapping_and_dense()) return false;
      for (const auto& state : states_[i])
        if (!are_laid_out_alike(state, weights_[i])) return false;
    }
    return true;
  }

  at::Tensor accumulate(std::vector<at::Tensor> grads, double grad_scale) {
    const Borrowed borrowed{grads_};
    take(grads, grad_scale);
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

  void advance(std::vector<at::Tensor> grads, double grad_scale, double lr, const at::Tensor& ratios,
               const at::Tensor& weight_decays, const std::optional<at::Tensor>& shrinkage, const at::Tensor& is_finite) {
    const Borrowed borrowed{grads_};
    take(grads, grad_scale);
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

  // A whole step. Returns [4, num_layers] fp64: weight norm, direction norm, trust ratio, weight decay in force; and
  // [num_layers] bool, whether the layer moved.
  std::tuple<at::Tensor, at::Tensor> step(std::vector<at::Tensor> grads, double grad_scale, double lr) {
    const Borrowed borrowed{grads_};
    take(grads, grad_scale);
    const auto num_layers = static_cast<int64_t>(weight_decays_.size());
    at::Tensor figures = at::zeros({4, num_layers}, at::kDouble);
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
        barrier(team);
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
  void take(std::vector<at::Tensor>& grads, double grad_scale) {
    TORCH_CHECK(grads.size() == weights_.size(), "expected ", weights_.size(), " gradients, got ", grads.size());
    grads_.clear();
    for (size_t i = 0; i < grads.size(); ++i) grads_.push_back(laid_out_like(grads[i], weights_[i]));
    double last_step = -1;
    Scalars common{};
    can_keep_ = rule_.algorithm >= Algorithm::lamb;
    keeps_in_grads_ = may_overwrite_grads_;
    for (size_t l = 0; l < layers_.size(); ++l) {
      Layer& layer = layers_[l];
      const int64_t t = tensors_[l];
      layer.weight = at_element(weights_[t], starts_[l]);
      layer.grad = at_element(grads_[t], starts_[l]);
      for (size_t s = 0; s < states_[t].size(); ++s) layer.state[s] = at_element(states_[t][s], starts_[l]);
      layer.weight_dtype = dtype_of(weights_[t]);
      layer.grad_dtype = dtype_of(grads_[t]);
      layer.state_dtype = dtype_of(states_[t][0]);
      is_fp64_ = layer.weight_dtype == Dtype::fp64;
      TORCH_CHECK((layer.grad_dtype == Dtype::fp64) == is_fp64_ && (layer.state_dtype == Dtype::fp64) == is_fp64_,
                  "fp64 weights go with fp64 gradients and state, all others with fp32, bf16 or fp16 ones");
      const double step = steps_.empty() ? 0.0 : static_cast<double>(*steps_[t].data_ptr<float>()) + 1.0;
      if (step != last_step) {
        common = scalars_of(step, grad_scale);
        last_step = step;
      }
      layer.scalars = common;
      layer.scalars.weight_decay = weight_decays_[rows_[l]];
      // not through a copy of the gradient, which would not be there in the second pass of a step in two calls
      keeps_in_grads_ = keeps_in_grads_ && layer.grad_dtype == (is_fp64_ ? Dtype::fp64 : Dtype::fp32) &&
                        grads_[t].is_same(grads[t]);
      can_keep_ = can_keep_ && layer.state_dtype != Dtype::bf16;
      layer.rounding_key = rounding_key(seeds_[rows_[l]], step);
    }
    keeps_in_grads_ = keeps_in_grads_ && can_keep_;
    if (can_keep_ && !keeps_in_grads_ && scratch_.empty()) scratch_.resize(total_numel_ * bytes_of_element() / 100);
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

  // Once the ratio is known. step_size comes in as the bias correction that belongs to the learning rate.
  void set_ratio(Scalars& s, double lr, double ratio, double weight_decay, double shrinkage) const {
    s.weight_decay = weight_decay;
    s.shrinkage = shrinkage;
    const double corrected = lr * s.step_size;
    s.step_size = is_fp64_ ? corrected * ratio : static_cast<float>(corrected) * static_cast<float>(ratio);
    const double local_lr = is_fp64_ ? lr * ratio : static_cast<float>(lr) * static_cast<float>(ratio);
    s.inside = rule_.lr_in_momentum ? local_lr : ratio;
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
      out[3 * num_layers + row] = decay_in_force;
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
    if (team == 1) return {begin, end};
    const int64_t before = begin == 0 ? 0 : cumulative_[begin - 1];
    const int64_t numel = (end == 0 ? 0 : cumulative_[end - 1]) - before;
    auto cut = [&](int part) {
      const int64_t wanted = before + numel * part / team;
      return static_cast<int>(std::lower_bound(cumulative_.begin() + begin, cumulative_.begin() + end, wanted) -
                              cumulative_.begin());
    };
    return {thread == 0 ? begin : cut(thread), thread + 1 == team ? end : cut(thread + 1)};
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

  std::vector<at::Tensor> weights_, grads_;
  std::vector<at::ScalarType> dtypes_;
  std::vector<std::vector<int64_t>> sizes_;
  std::vector<std::vector<at::Tensor>> states_;
  std::vector<at::Tensor> steps_;
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

// --- free functions -------------------------------------------------------------------------------------------------

at::Tensor square_sums(const std::vector<at::Tensor>& tensors) {
  struct Piece {
    const void* values;
    Dtype dtype;
    int64_t begin, end;
    int tensor;
  };
  at::Tensor sums = at::zeros({static_cast<int64_t>(tensors.size())}, at::kDouble);
  std::vector<at::Tensor> kept;
  std::vector<Piece> pieces;
  int64_t numel = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    kept.push_back(tensors[i].is_non_overlapping_and_dense() ? tensors[i] : tensors[i].contiguous());
    for (int64_t begin = 0; begin < kept[i].numel(); begin += chunk_numel)
      pieces.push_back({kept[i].data_ptr(), dtype_of(kept[i]), begin, std::min(begin + chunk_numel, kept[i].numel()),
                        static_cast<int>(i)});
    numel += kept[i].numel();
  }
  std::vector<double> parts(pieces.size());
  py::gil_scoped_release release;
  in_parallel(num_threads_for(numel), [&](int thread, int team) {
    const size_t begin = pieces.size() * thread / team, end = pieces.size() * (thread + 1) / team;
    for (size_t p = begin; p < end; ++p)
      parts[p] = passes_in_use()->square_sum(pieces[p].values, pieces[p].dtype, pieces[p].begin, pieces[p].end);
  });
  double* out = sums.data_ptr<double>();
  for (size_t p = 0; p < pieces.size(); ++p) out[pieces[p].tensor] += parts[p];
  return sums;
}

void count(const std::vector<at::Tensor>& steps) {
  for (const auto& step : steps) *step.data_ptr<float>() += 1.0f;
}

}  // namespace largebatch

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  using namespace largebatch;
  py::class_<Plan>(module, "Plan")
      .def(py::init<std::vector<at::Tensor>, std::vector<std::vector<at::Tensor>>, std::vector<at::Tensor>,
                    const std::vector<std::array<int64_t, 5>>&, std::vector<double>, std::vector<double>,
                    std::vector<bool>, std::vector<uint32_t>, const py::dict&, bool>())
      .def("is_current", &Plan::is_current)
      .def("is_flat", &Plan::is_flat)
      .def("accumulate", &Plan::accumulate)
      .def("advance", &Plan::advance)
      .def("step", &Plan::step);
  module.def("square_sums", &square_sums);
  module.def("count", &count);
  module.def("instruction_sets", &instruction_sets);
  module.def("use_instruction_set", &use_instruction_set);
}
