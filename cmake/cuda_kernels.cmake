set(FASTPRUNE_CUDA_STATUS "not built: stub")
