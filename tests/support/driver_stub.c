/* A libcuda.so.1 that takes the driver's calls and runs nothing: whether the arguments that the engine hands to
   cuda-bindings arrive as the driver's interface wants them. Device memory is the host's. STUB_FAIL=call:status makes a
   call fail. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void *const CONTEXT = (void *)0x10, *const STREAM = (void *)0x20, *const MODULE = (void *)0x30,
                  *const FUNCTION = (void *)0x40;

static int failing(const char *call) {
  const char *wanted = getenv("STUB_FAIL");
  size_t n = strlen(call);
  return wanted && !strncmp(wanted, call, n) && wanted[n] == ':' ? atoi(wanted + n + 1) : 0;
}

int cuInit(unsigned flags) { return failing("cuInit"); }
int cuDriverGetVersion(int *version) { return *version = 12060, 0; }
int cuDeviceGetCount(int *count) { return *count = 1, 0; }
int cuDeviceGet(int *device, int index) { return *device = index, 0; }
int cuDevicePrimaryCtxSetFlags_v2(int device, unsigned flags) { return printf("flags %u\n", flags), 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { return *context = CONTEXT, 0; }
int cuCtxSetCurrent(void *context) { return context == CONTEXT ? 0 : 201; }
int cuStreamCreate(void **stream, unsigned flags) { return *stream = STREAM, 0; }
int cuDeviceGetName(char *name, int size, int device) { return snprintf(name, size, "stub"), 0; }
int cuDeviceGetAttribute(int *value, int which, int device) {
  *value = which == 75 ? 8 : which == 76 ? 7 : which == 16 ? 8 : which == 97 ? 101376 : -1;
  return 0;
}
int cuModuleLoadData(void **module, const char *ptx) {
  *module = MODULE;
  return strstr(ptx, ".version") ? failing("cuModuleLoadData") : 218;
}
int cuModuleGetFunction(void **function, void *module, const char *name) {
  printf("function %s\n", strstr(name, "serve") ? "serve" : "run");
  return *function = FUNCTION, module == MODULE ? 0 : 400;
}
int cuFuncSetAttribute(void *function, int which, int value) { return function == FUNCTION && which == 8 ? 0 : 400; }
int cuMemAlloc_v2(uint64_t *address, size_t size) {
  *address = (uintptr_t)calloc(1, size);
  return failing("cuMemAlloc");
}
int cuMemHostAlloc(void **memory, size_t size, unsigned flags) {
  *memory = malloc(size);
  memset(*memory, 7, size);
  return flags == 2 ? 0 : 1;
}
int cuMemHostGetDevicePointer_v2(uint64_t *address, void *memory, unsigned flags) {
  return *address = (uintptr_t)memory, 0;
}
int cuMemcpyHtoD_v2(uint64_t to, const void *from, size_t size) { return memcpy((void *)to, from, size), 0; }
int cuMemcpyDtoH_v2(void *to, uint64_t from, size_t size) {
  return memcpy(to, (void *)from, size), failing("cuMemcpyDtoH");
}
int cuStreamSynchronize(void *stream) { return stream == STREAM ? failing("cuStreamSynchronize") : 400; }
int cuStreamQuery(void *stream) {
  static int asked;
  return stream == STREAM ? (asked++ ? 0 : 600) : 400;
}
int cuLaunchKernel(void *function, unsigned grid, unsigned y, unsigned z, unsigned threads, unsigned ty, unsigned tz,
                   unsigned shared, void *stream, void **arguments, void **extra) {
  /* The last but six words of the array of counters are sizes: steps or slots, lanes, widest, blocks. */
  int first = atoi(getenv("STUB_POINTERS") ? getenv("STUB_POINTERS") : "7");
  printf("launch %u x %u:", grid, threads);
  for (int i = first; i < first + 4; i++) printf(" %d", *(int *)arguments[i]);
  printf("\n");
  return function == FUNCTION && stream == STREAM ? failing("cuLaunchKernel") : 400;
}
int cuGetProcAddress_v2(const char *name, void **found, int version, uint64_t flags, int *status) {
  static const char *const suffixes[] = {"_v2", ""};
  void *self = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
  char whole[200];
  *found = 0;
  for (int i = 0; i < 2 && !*found; i++) {
    snprintf(whole, sizeof whole, "%s%s", name, suffixes[i]);
    *found = dlsym(self, whole);
  }
  if (status) *status = *found ? 0 : 1;
  return *found ? 0 : 500;
}
