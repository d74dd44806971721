#pragma once
#include "adapter/adapter.h"

namespace lwft::LWFT_ISA {

void adapter_backward(const AdapterBackward& p);

}  // namespace lwft::LWFT_ISA
