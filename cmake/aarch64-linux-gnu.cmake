# The torch-free CPU kernels for 64-bit Arm, by Debian's g++-aarch64-linux-gnu (`make cross`); their tests run under
# Debian's qemu-user-static where it is installed.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
find_program(LWFT_QEMU_AARCH64 qemu-aarch64-static)
if(LWFT_QEMU_AARCH64)
  set(CMAKE_CROSSCOMPILING_EMULATOR ${LWFT_QEMU_AARCH64} -L /usr/aarch64-linux-gnu)
endif()
