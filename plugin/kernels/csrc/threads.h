// Teams of threads, and the caches that they have.
#pragma once

#include <unistd.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#include <cstdint>
#include <fstream>
#include <string>

namespace largebatch {

// Bytes of a cache of the first processor, as Linux says; else what sysconf says, which may be the sum over all processors of
// a socket; else the given size.
inline int64_t cache_bytes(int level, int sysconf_name, int64_t otherwise) {
  for (int index = 0;; ++index) {
    const std::string folder = "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index);
    std::ifstream level_file(folder + "/level"), size_file(folder + "/size");
    int its_level = 0;
    int64_t number = 0;
    char unit = 0;
    if (!(level_file >> its_level)) break;
    if (its_level != level || !(size_file >> number >> unit) || number <= 0) continue;
    if (unit == 'K') return number << 10;
    if (unit == 'M') return number << 20;
  }
  const long found = sysconf_name < 0 ? -1 : sysconf(sysconf_name);
  return found > 0 ? static_cast<int64_t>(found) : otherwise;
}

#ifdef _SC_LEVEL2_CACHE_SIZE
constexpr int second_level_name = _SC_LEVEL2_CACHE_SIZE, third_level_name = _SC_LEVEL3_CACHE_SIZE;
#else
constexpr int second_level_name = -1, third_level_name = -1;
#endif

inline int64_t second_level_cache_bytes() {
  static const int64_t bytes = cache_bytes(2, second_level_name, int64_t{1} << 20);
  return bytes;
}

inline int64_t third_level_cache_bytes() {
  static const int64_t bytes = cache_bytes(3, third_level_name, int64_t{8} << 20);
  return bytes;
}

// Calls work(thread, num_threads) on each thread of a team. It must not throw: the others would wait for ever.
template <class Work> void in_parallel([[maybe_unused]] int num_threads, Work work) {
#ifdef _OPENMP
  if (num_threads > 1) {
#pragma omp parallel num_threads(num_threads)
    work(omp_get_thread_num(), omp_get_num_threads());
    return;
  }
#endif
  work(0, 1);
}

inline void barrier([[maybe_unused]] int num_threads) {
#ifdef _OPENMP
  if (num_threads > 1) {
#pragma omp barrier
  }
#endif
}

}  // namespace largebatch
