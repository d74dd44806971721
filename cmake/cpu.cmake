# lwft_cpu_kernels: every *_cpu.cpp (the kernels of a room, the products they share) compiled once per level
# of instruction set; the other files of csrc/common/cpu (dispatch, threads) once, with baseline flags.
#
# A *_cpu.cpp is compiled with -DLWFT_ISA=<level> and puts all it defines into namespace lwft::LWFT_ISA. The
# rest of the code is told the levels as LWFT_ISA_LEVELS, a list in rising order: X(baseline) X(avx2) ...
include(CheckCXXCompilerFlag)

if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  set(isa_known baseline avx2 avx512 avx512_bf16 amx_bf16)
  set(isa_flags_baseline)
  set(isa_flags_avx2 -mavx2 -mfma -mf16c)
  set(isa_flags_avx512 ${isa_flags_avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl)
  set(isa_flags_avx512_bf16 ${isa_flags_avx512} -mavx512bf16)
  set(isa_flags_amx_bf16 ${isa_flags_avx512_bf16} -mamx-tile -mamx-bf16)
else()
  set(isa_known baseline)  # on aarch64 that is NEON
  set(isa_flags_baseline)
endif()
set(LWFT_ISA_LEVELS "" CACHE STRING "Instruction-set levels to compile the CPU kernels for; empty: all")
set(isa_wanted ${LWFT_ISA_LEVELS})
if(NOT isa_wanted)
  set(isa_wanted ${isa_known})
endif()

set(isa_levels)
foreach(level IN LISTS isa_wanted)
  if(NOT level IN_LIST isa_known)
    message(FATAL_ERROR "LWFT_ISA_LEVELS: ${CMAKE_SYSTEM_PROCESSOR} has ${isa_known}, not '${level}'")
  endif()
  string(REPLACE ";" " " flags "${isa_flags_${level}}")
  if(flags)
    check_cxx_compiler_flag("${flags}" LWFT_COMPILER_HAS_${level})
    if(NOT LWFT_COMPILER_HAS_${level})
      message(WARNING "${CMAKE_CXX_COMPILER} does not know ${flags}: built without the level ${level}")
      continue()
    endif()
  endif()
  list(APPEND isa_levels ${level})
endforeach()
message(STATUS "CPU kernels: ${isa_levels}")

# lwft_compile_per_level(<name> <sources>...): sets <name>_objects to what a library or program links in.
#
# An inline function from outside lwft::<level> (of std::vector, say) that a level emits out of line is, to
# the linker, the same function as every other level's, and it keeps one: perhaps the one with AVX-512 in it,
# for all. So the objects of a level become one object, in which only lwft::<level> stays visible.
# (Not under sanitizers, whose own linker groups have to survive.)
function(lwft_compile_per_level name)
  set(objects)
  foreach(level IN LISTS isa_levels)
    set(target ${name}_${level})
    add_library(${target} OBJECT ${ARGN})
    target_include_directories(${target} PRIVATE csrc)
    target_compile_definitions(${target} PRIVATE LWFT_ISA=${level})
    target_compile_options(${target} PRIVATE ${isa_flags_${level}})
    if(LWFT_SANITIZE OR NOT CMAKE_OBJCOPY)
      list(APPEND objects "$<TARGET_OBJECTS:${target}>")
      continue()
    endif()
    set(object ${PROJECT_BINARY_DIR}/isa/${level}/${name}.o)
    string(LENGTH ${level} length)  # as the Itanium mangling spells a name: its length, then its letters
    add_custom_command(
      OUTPUT ${object}
      COMMAND ${CMAKE_COMMAND} -E make_directory ${PROJECT_BINARY_DIR}/isa/${level}
      COMMAND ${CMAKE_CXX_COMPILER} -nostdlib -r -Wl,--force-group-allocation -o ${object}
              "$<TARGET_OBJECTS:${target}>"
      COMMAND ${CMAKE_OBJCOPY} --wildcard "--keep-global-symbol=_ZN4lwft${length}${level}*" ${object}
      DEPENDS "$<TARGET_OBJECTS:${target}>"
      COMMENT "Closing instruction-set level ${level} of ${name}"
      COMMAND_EXPAND_LISTS VERBATIM)
    list(APPEND objects ${object})
  endforeach()
  set(${name}_objects ${objects} PARENT_SCOPE)
endfunction()

file(GLOB kernel_sources CONFIGURE_DEPENDS csrc/*/*_cpu.cpp csrc/common/cpu/*_cpu.cpp)
file(GLOB cpu_common_sources CONFIGURE_DEPENDS csrc/common/cpu/*.cpp)
list(FILTER kernel_sources EXCLUDE REGEX "/csrc/(harness|tests)/")
list(REMOVE_ITEM cpu_common_sources ${kernel_sources})
lwft_compile_per_level(kernels ${kernel_sources})

list(TRANSFORM isa_levels REPLACE "(.+)" "X(\\1)" OUTPUT_VARIABLE isa_list)
list(JOIN isa_list " " isa_list)

add_library(lwft_cpu_kernels STATIC ${cpu_common_sources} ${kernels_objects})
target_include_directories(lwft_cpu_kernels PUBLIC csrc)
target_compile_definitions(lwft_cpu_kernels PUBLIC "LWFT_ISA_LEVELS=${isa_list}")
target_link_libraries(lwft_cpu_kernels PUBLIC Threads::Threads)
