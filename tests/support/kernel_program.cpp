// Steps of the CPU kernels without Python and torch. Prints, for each instruction set, rule, types and number of threads, a hash of
// all bits that were written: the same on every processor.

#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <iterator>
#include <memory>
#include <vector>

#include "plan.h"

using namespace largebatch;

namespace {

uint64_t random_state;

// k / 1024 with |k| < 1024: exact in every type but bf16, which drops the last bits.
double next_value() {
  random_state = random_state * 6364136223846793005u + 1442695040888963407u;
  return (static_cast<int>(random_state >> 33) % 2047 - 1023) / 1024.0;
}

void write(char* to, Dtype dtype, double value) {
  const float single = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &single, 4);
  if (dtype == Dtype::fp64) std::memcpy(to, &value, 8);
  if (dtype == Dtype::fp32) std::memcpy(to, &single, 4);
  uint16_t half = static_cast<uint16_t>(bits >> 16);
  if (dtype == Dtype::fp16) {
    int exponent = 0;
    const double fraction = std::frexp(std::abs(value), &exponent);  // in [0.5, 1), or 0
    half = value == 0 ? 0
                      : static_cast<uint16_t>((exponent + 14) << 10 |
                                              (static_cast<int>(fraction * 2048) & 0x3FF));
    if (value < 0) half |= 0x8000;
  }
  if (size_of(dtype) == 2) std::memcpy(to, &half, 2);
}

struct Types {
  const char* name;
  Dtype weight, grad, state;
};

const Types all_types[] = {
    {"fp32", Dtype::fp32, Dtype::fp32, Dtype::fp32},
    {"fp64", Dtype::fp64, Dtype::fp64, Dtype::fp64},
    {"bf16", Dtype::bf16, Dtype::bf16, Dtype::fp32},
    {"fp16", Dtype::fp16, Dtype::fp16, Dtype::fp32},
    {"bf16 state", Dtype::fp32, Dtype::bf16, Dtype::bf16},
};

const int64_t numels[] = {1, 15, 16, 17, 4095, 4096, 4097, 70000, 0, 33};

Rule rule_of(Algorithm algorithm) {
  Rule rule{};
  rule.algorithm = algorithm;
  rule.beta1 = 0.9, rule.beta2 = 0.99, rule.eps = 1e-6, rule.momentum = 0.9,
  rule.trust_coefficient = 0.01;
  rule.bias_correction = true, rule.nesterov = true;
  return rule;
}

uint64_t run(Algorithm algorithm, const Types& types, int num_threads) {
  const Dtype dtypes[4] = {types.weight, types.grad, types.state, types.state};
  std::vector<std::vector<char>>
      arrays;  // each of its exact size, so that a sanitizer sees what lies beyond
  std::vector<Span> spans;
  std::vector<Treatment> treatments;
  std::vector<Place> places;
  random_state = 1;
  for (int64_t numel : numels)
    for (Dtype dtype : dtypes) arrays.emplace_back(numel * size_of(dtype));
  float count = 0;
  for (int64_t tensor = 0; tensor < static_cast<int64_t>(std::size(numels)); ++tensor) {
    Place place{};
    char** const columns[4] = {&place.weight, &place.grad, &place.state[0], &place.state[1]};
    for (int c = 0; c < 4; ++c) *columns[c] = arrays[4 * tensor + c].data();
    place.step = &count;
    place.weight_dtype = types.weight, place.grad_dtype = types.grad,
    place.state_dtype = types.state;
    for (int64_t i = 0; i < numels[tensor]; ++i)
      write(place.weight + i * size_of(types.weight), types.weight, next_value());
    places.push_back(place);
    spans.push_back({tensor, 0, numels[tensor], tensor, tensor == 3 ? (int64_t{1} << 32) - 8 : 0});
    treatments.push_back(
        {0.01, tensor % 2 ? 0.0 : 0.1, static_cast<uint32_t>(77 * tensor), tensor != 2});
  }
  Plan plan(spans, treatments, rule_of(algorithm));
  std::vector<double> figures(plan.num_layers() * plan.num_figures());
  const auto good = std::make_unique<bool[]>(plan.num_layers());
  for (int step = 0; step < 3; ++step) {
    for (const Place& place : places)
      for (int64_t i = 0; i < numels[&place - places.data()]; ++i)
        write(place.grad + i * size_of(types.grad), types.grad, next_value());
    plan.take(places, 0.5);
    plan.step(0.02, figures.data(), good.get(), num_threads);
    count += 1;
  }
  uint64_t hash = 1469598103934665603u;
  for (const auto& array : arrays)
    for (char byte : array) hash = (hash ^ static_cast<unsigned char>(byte)) * 1099511628211u;
  return hash;
}

}  // namespace

int main() {
  for (const Passes* passes : available_passes()) {
    passes_in_use() = passes;
    for (int algorithm = 0; algorithm < 6; ++algorithm)
      for (const Types& types : all_types)
        for (int num_threads : {1, 3})
          std::printf("%s,%d,%s,%d,%016" PRIx64 "\n", passes->name, algorithm, types.name,
                      num_threads, run(static_cast<Algorithm>(algorithm), types, num_threads));
  }
}
