// What a pass over one chunk of one layer needs, and the table of passes that each instruction set provides.
// To be included before a file's target region: what is defined here is for every processor.
#pragma once

#include <cstdint>

namespace largebatch {

enum class Dtype : int { fp64 = 0, fp32 = 1, bf16 = 2, fp16 = 3 };

constexpr int64_t size_of(Dtype dtype) {
  return dtype == Dtype::fp64 ? 8 : dtype == Dtype::fp32 ? 4 : 2;
}

// In the order of largebatch.kernels.interface.ALGORITHMS.
enum class Algorithm : int { lars2017, lars2019, lamb, nlamb, nnlamb, lans };

// Of the vectors whose norms a rule wants beside that of the weights: 1, of LANS 2.
constexpr int max_num_directions = 2;

// Elements of a chunk: the unit of work of a thread, and of the fixed order in which sums are taken.
constexpr int64_t chunk_numel = 4096;

// Lanes of the fp64 sums of a chunk, the same for every instruction set, so that all of them give the same bits.
constexpr int num_lanes = 16;

// Scalars of one layer in one step, in fp64; each pass rounds them once to its compute type.
struct Scalars {
  double grad_scale;
  // coupled; of the first pass the configured one, of the second the one in force
  double weight_decay;
  // of LARS: coupled weight decay that belongs to the vector whose norm is taken, or 0
  double decay_in_direction;
  double shrinkage;  // 1 - lr * decoupled weight decay
  double beta1, beta2, eps;
  double grad_in_m_hat, m_in_m_hat;  // m_hat = m_in_m_hat * m + grad_in_m_hat * g
  double grad_in_v_hat, v_in_v_hat;  // v_hat = v_in_v_hat * v + grad_in_v_hat * g^2
  double momentum;
  // LARS: what multiplies the gradient on its way into the momentum, and the momentum
  double inside, outside;
  double step_size;           // lr * trust ratio, where the rule has one
  double gradient_step_size;  // of LANS: what multiplies the second direction
  // of LANS: of the whole layer, what its gradient is divided by; NaN where it is not finite
  double grad_norm;
  bool is_nesterov;
};

// One layer's part that lies in one tensor; pointers to its first element.
struct Layer {
  void* weight;
  const void* grad;
  void* state[2];
  Dtype weight_dtype, grad_dtype, state_dtype;
  int64_t numel;
  int64_t layer_start;    // of the first element in the flattened layer
  uint32_t rounding_key;  // of layer and step
  Scalars scalars;
};

struct Passes {
  const char* name;
  // Renews the state of elements [begin, end) if the rule accumulates; sums[0], sums[1], ...: squares of weights and directions.
  // kept: null, or a place for the direction of these elements in the compute type, for the second pass; may be the
  // gradient itself. Only for LAMB and its kin with state that is stored as it is computed.
  void (*first)(Algorithm, bool is_fp64, const Layer&, int64_t begin, int64_t end, double* sums,
                void* kept);
  // Writes the new weights of elements [begin, end), and the state of a rule that does not accumulate.
  void (*second)(Algorithm, bool is_fp64, const Layer&, int64_t begin, int64_t end,
                 const void* kept);
  // Sum of the squares of elements [begin, end) times scale, rounded to fp64 or fp32 before they are squared.
  double (*square_sum)(const void* values, Dtype, bool is_fp64, double scale, int64_t begin,
                       int64_t end);
};

extern const Passes passes_portable;
extern const Passes passes_avx2, passes_avx512;  // only for x86-64

}  // namespace largebatch
