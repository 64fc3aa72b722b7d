# Imports LibTorch from its files: targets LibTorch::torch, LibTorch::torch_cpu, LibTorch::c10 and
# LibTorch::gomp, variables LIBTORCH_ROOT and LIBTORCH_VERSION. Where there is none, LIBTORCH_ERROR
# says what was looked for, and the file that includes this one decides.
#
# Not find_package(Torch): for a CUDA build of PyTorch (what PyPI gives by default) it enables the
# CUDA language, and stops where no CUDA toolkit is installed or CMake doesn't know the dialect it
# asks for. This library has no CUDA code and needs neither.
#
# Where torch is looked for, first match wins:
#   LIBTORCH_ROOT          the folder that holds include/ and lib/ of LibTorch
#   Torch_DIR              as for find_package(Torch): <root>/share/cmake/Torch
#   CMAKE_PREFIX_PATH      <root>, or torch.utils.cmake_prefix_path; the variable, then the environment
#   Python_EXECUTABLE      the torch installed in that Python
#   LIBTORCH_SUGGESTIONS   folders an installed mixhead names: beside itself, where it was built
#   python3, python        the torch installed in the Python of PATH

function(_libtorch_is_root folder result)
  set(${result} FALSE PARENT_SCOPE)
  if(EXISTS "${folder}/include/torch/headeronly/version.h" AND EXISTS "${folder}/lib")
    set(${result} TRUE PARENT_SCOPE)
  endif()
endfunction()

# The folder of the torch package that `python` would import, without the seconds an import takes.
function(_libtorch_of_python python result)
  execute_process(
    COMMAND "${python}" -c
            "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"
    OUTPUT_VARIABLE folder
    ERROR_QUIET
    OUTPUT_STRIP_TRAILING_WHITESPACE)
  set(${result} "${folder}" PARENT_SCOPE)
endfunction()

function(_libtorch_find result)
  set(candidates "")
  if(Torch_DIR)
    list(APPEND candidates "${Torch_DIR}/../../..")
  endif()
  string(REPLACE ":" ";" environment_prefixes "$ENV{CMAKE_PREFIX_PATH}")
  foreach(prefix IN LISTS CMAKE_PREFIX_PATH environment_prefixes)
    list(APPEND candidates "${prefix}" "${prefix}/../..")
  endforeach()
  if(Python_EXECUTABLE)
    _libtorch_of_python("${Python_EXECUTABLE}" folder)
    list(APPEND candidates "${folder}")
  endif()
  list(APPEND candidates ${LIBTORCH_SUGGESTIONS})

  foreach(candidate IN LISTS candidates)
    _libtorch_is_root("${candidate}" found)
    if(found)
      get_filename_component(candidate "${candidate}" ABSOLUTE)
      set(${result} "${candidate}" PARENT_SCOPE)
      return()
    endif()
  endforeach()
  foreach(python IN ITEMS python3 python)
    _libtorch_of_python("${python}" folder)
    _libtorch_is_root("${folder}" found)
    if(found)
      set(${result} "${folder}" PARENT_SCOPE)
      return()
    endif()
  endforeach()
  set(${result} "" PARENT_SCOPE)
endfunction()

set(LIBTORCH_ERROR "")
if(LIBTORCH_ROOT)
  _libtorch_is_root("${LIBTORCH_ROOT}" _libtorch_found)
  if(NOT _libtorch_found)
    set(LIBTORCH_ERROR
      "LIBTORCH_ROOT=${LIBTORCH_ROOT} holds no LibTorch 2.11 or newer: there is no include/torch/headeronly/version.h in it.")
  endif()
else()
  _libtorch_find(LIBTORCH_ROOT)
  if(NOT LIBTORCH_ROOT)
    set(LIBTORCH_ERROR
      "No LibTorch 2.11 or newer was found. Name one with -DPython_EXECUTABLE=<a Python that has torch> or -DLIBTORCH_ROOT=<the folder that holds its include/ and lib/>.")
  endif()
endif()
if(LIBTORCH_ERROR)
  return()
endif()

file(STRINGS "${LIBTORCH_ROOT}/include/torch/headeronly/version.h" _libtorch_numbers
     REGEX "#define TORCH_VERSION_(MAJOR|MINOR|PATCH) ")
string(REGEX REPLACE "[^;0-9]+" "" _libtorch_numbers "${_libtorch_numbers}")
string(REPLACE ";" "." LIBTORCH_VERSION "${_libtorch_numbers}")
if(TARGET LibTorch::torch)
  return()
endif()

function(_libtorch_import name)
  add_library(LibTorch::${name} SHARED IMPORTED)
  set_target_properties(LibTorch::${name} PROPERTIES
    IMPORTED_LOCATION "${LIBTORCH_ROOT}/lib/lib${name}.so"
    INTERFACE_LINK_LIBRARIES "${ARGN}")
endfunction()

_libtorch_import(c10)
set_target_properties(LibTorch::c10 PROPERTIES
  INTERFACE_INCLUDE_DIRECTORIES
  "${LIBTORCH_ROOT}/include;${LIBTORCH_ROOT}/include/torch/csrc/api/include"
  INTERFACE_COMPILE_FEATURES cxx_std_20)
_libtorch_import(torch_cpu LibTorch::c10)
_libtorch_import(torch LibTorch::torch_cpu)
# The CUDA half of torch names libraries (cudart, cudnn, ...) that are found when it is loaded; they
# need not be there at link time.
set_target_properties(LibTorch::torch PROPERTIES
  INTERFACE_LINK_OPTIONS "LINKER:--allow-shlib-undefined")

# torch brings its own OpenMP runtime, in some builds under a name of its own
# (libgomp-a34b3233.so.1). A second one in a process would make a second pool of threads, so this one
# is linked and no other. Where it can't be seen nothing is linked: libtorch_cpu brings the symbols.
add_library(LibTorch::gomp INTERFACE IMPORTED)
file(GLOB _libtorch_gomp
     "${LIBTORCH_ROOT}/lib/libgomp*.so*" "${LIBTORCH_ROOT}/../torch.libs/libgomp*.so*")
if(_libtorch_gomp)
  list(GET _libtorch_gomp 0 _libtorch_gomp)
  set_target_properties(LibTorch::gomp PROPERTIES INTERFACE_LINK_LIBRARIES "${_libtorch_gomp}")
endif()
