// Walks over elements that lie together, and over the work of many tensors at once.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

#include "rounding.h"

namespace slimstate {

// Calls f(done, count, index) for stretches of [first, first + count) whose indices in the whole tensor count in ones.
template <typename F>
inline void stretches(const Place& place, uint64_t first, int64_t count, const F& f) {
  for (int64_t done = 0; done < count;) {
    const uint64_t i = first + static_cast<uint64_t>(done);
    const auto own = static_cast<int64_t>(std::min(static_cast<uint64_t>(count - done), place.width - i % place.width));
    f(done, own, place.index(i));
    done += own;
  }
}

}  // namespace slimstate
