// The one exception kernels and bindings throw; the binding turns it into ValueError.
#pragma once
#include <stdexcept>
#include <string>

namespace kf {

struct InvalidArgument : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

inline void require(bool ok, const std::string& message) {
  if (!ok) throw InvalidArgument(message);
}

}  // namespace kf
