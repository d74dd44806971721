// What the tests of emulated CUDA share: the orders in which threads may run and copies may land.
#pragma once
#include <functional>

#include "common/cuda/portable.cuh"
#include "tests/check.h"

namespace lwft::tests {

// Runs `body` under every schedule, with late and with early copies.
inline void in_every_mode(const std::function<void()>& body) {
  for (cuda::emulation::Schedule schedule : {cuda::emulation::Schedule::round_robin, cuda::emulation::Schedule::greedy,
                                             cuda::emulation::Schedule::greedy_reversed}) {
    for (bool early : {false, true}) {
      cuda::emulation::options = {schedule, early};
      body();
    }
  }
  cuda::emulation::options = {};
}

}  // namespace lwft::tests
