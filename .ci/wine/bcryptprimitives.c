/* What wine before 9 lacks, and Rust's standard library imports: random bytes. Put into wine's
 * directory for tests; Windows has its own, and nothing of this goes into a release. */
#include <windows.h>

BOOLEAN NTAPI SystemFunction036(void *bytes, ULONG length);

__declspec(dllexport) BOOL WINAPI ProcessPrng(unsigned char *bytes, SIZE_T length) {
    while (length > 0) {
        ULONG piece = length > 1 << 20 ? 1 << 20 : (ULONG)length;
        if (!SystemFunction036(bytes, piece)) {
            return FALSE;
        }
        bytes += piece;
        length -= piece;
    }
    return TRUE;
}
