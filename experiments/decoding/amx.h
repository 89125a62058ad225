// For GCC 12.2, whose _tile_loadconfig tells the compiler of 8 of the 64 bytes that the instruction
// reads: the others may not be written yet, and the processor refuses the configuration.
#if defined(__AMX_TILE__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#define _tile_loadconfig(config) \
  __asm__ volatile("ldtilecfg %0" ::"m"(*(const char(*)[64])(config)) : "memory")
#endif
