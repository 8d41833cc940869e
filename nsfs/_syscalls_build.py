"""Build the cffi module: the system calls that Python's os module does not offer.

API mode, so every constant and structure comes from the headers of the machine that builds it.
"""

from cffi import FFI

ffi = FFI()

ffi.cdef(
    """
    static const int IN_MODIFY, IN_NONBLOCK, IN_CLOEXEC, IN_IGNORED, IN_DELETE_SELF;
    static const unsigned long MS_BIND, MS_REC, MS_PRIVATE, MS_SLAVE, MS_UNBINDABLE, MS_RDONLY,
        MS_REMOUNT, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_RELATIME;
    static const int MNT_DETACH;
    static const int CLONE_NEWNS;

    int nsfs_mount(const char *source, const char *target, const char *type,
                   unsigned long flags, const char *data);
    int nsfs_umount(const char *target, int flags);
    int nsfs_inotify_init(void);
    int nsfs_inotify_add(int fd, const char *path, unsigned int mask);
    int nsfs_inotify_remove(int fd, int watch);
    int nsfs_openat2(int dirfd, const char *path, unsigned long long flags,
                     unsigned long long resolve);
    int nsfs_setns(int fd, int type);
    int nsfs_fsopen(const char *type);
    int nsfs_fsconfig(int fd, unsigned int command, const char *key, const char *value);
    int nsfs_fsmount(int fd, unsigned int attributes);
    static const unsigned int FSCONFIG_CMD_CREATE, FSCONFIG_SET_STRING;
    static const unsigned int MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC;
    static const unsigned long long RESOLVE_IN_ROOT, RESOLVE_NO_MAGICLINKS;
    int nsfs_pidfd_getfd(int pid, int fd);
    int nsfs_notif_recv(int fd, void *notif);
    int nsfs_notif_valid(int fd, unsigned long long id);
    int nsfs_notif_send(int fd, unsigned long long id, long long value, int error);
    int nsfs_effective(int pid, unsigned int *capabilities);
    void nsfs_keep_answer(unsigned long long unique, int pid, int dir_fd, const char *path);
    void nsfs_forget_answers(void);
    int nsfs_namespaces(int pid, unsigned int *numbers);
    static const unsigned long NS_GET_USERNS, NS_GET_PARENT, NS_GET_OWNER_UID;
    """
)

ffi.set_source(
    "nsfs._syscalls",
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <errno.h>
    #include <fcntl.h>
    #include <linux/capability.h>
    #include <linux/nsfs.h>
    #include <linux/openat2.h>
    #include <linux/seccomp.h>
    #include <sched.h>
    #include <signal.h>
    #include <stdio.h>
    #include <string.h>
    #include <sys/inotify.h>
    #include <sys/ioctl.h>
    #include <sys/mount.h>
    #include <sys/syscall.h>
    #include <sys/time.h>
    #include <unistd.h>

    /* Each returns what the call does, or -errno: no second call to fetch errno. */
    static int nsfs_result(long r) { return r < 0 ? -errno : (int)r; }

    static int nsfs_mount(const char *source, const char *target, const char *type,
                          unsigned long flags, const char *data)
    { return nsfs_result(mount(source, target, type, flags, data)); }

    static int nsfs_umount(const char *target, int flags)
    { return nsfs_result(umount2(target, flags)); }

    static int nsfs_inotify_init(void)
    { return nsfs_result(inotify_init1(IN_NONBLOCK | IN_CLOEXEC)); }

    static int nsfs_inotify_add(int fd, const char *path, unsigned int mask)
    { return nsfs_result(inotify_add_watch(fd, path, mask)); }

    static int nsfs_inotify_remove(int fd, int watch)
    { return nsfs_result(inotify_rm_watch(fd, watch)); }

    /* In the interposer, where that is preloaded. */
    extern void nsfs_interposer_keep_answer(unsigned long long unique, int pid, int dir_fd,
                                            const char *path) __attribute__((weak));
    extern void nsfs_interposer_forget_answers(void) __attribute__((weak));

    static void nsfs_keep_answer(unsigned long long unique, int pid, int dir_fd, const char *path)
    { if (nsfs_interposer_keep_answer) nsfs_interposer_keep_answer(unique, pid, dir_fd, path); }

    static void nsfs_forget_answers(void)
    { if (nsfs_interposer_forget_answers) nsfs_interposer_forget_answers(); }

    static int nsfs_setns(int fd, int type)
    { return nsfs_result(setns(fd, type)); }

    static int nsfs_fsopen(const char *type)
    { return nsfs_result(syscall(SYS_fsopen, type, FSOPEN_CLOEXEC)); }

    static int nsfs_fsconfig(int fd, unsigned int command, const char *key, const char *value)
    { return nsfs_result(syscall(SYS_fsconfig, fd, command, key, value, 0)); }

    static int nsfs_fsmount(int fd, unsigned int attributes)
    { return nsfs_result(syscall(SYS_fsmount, fd, FSMOUNT_CLOEXEC, attributes)); }

    static int nsfs_openat2(int dirfd, const char *path, unsigned long long flags,
                            unsigned long long resolve)
    {
        struct open_how how;
        memset(&how, 0, sizeof how);
        how.flags = flags;
        how.resolve = resolve;
        return nsfs_result(syscall(SYS_openat2, dirfd, path, &how, sizeof how));
    }

    static int nsfs_pidfd_getfd(int pid, int fd)
    {
        int pid_fd = nsfs_result(syscall(SYS_pidfd_open, pid, 0)), result;
        if (pid_fd < 0)
            return pid_fd;
        result = nsfs_result(syscall(SYS_pidfd_getfd, pid_fd, fd, 0));
        close(pid_fd);
        return result;
    }

    static void nsfs_nothing(int number) { (void)number; }

    /* There is no way to ask without waiting for a call, and whoever else has the listener may have
     * received the one that there was.  So a signal ends the wait. */
    static int nsfs_notif_recv(int fd, void *notif)
    {
        static const struct sigaction action = { .sa_handler = nsfs_nothing };
        static const struct itimerval each_ms = { { 0, 1000 }, { 0, 1000 } }, never;
        static int ready;
        int result;

        if (!ready && sigaction(SIGALRM, &action, NULL) < 0)
            return nsfs_result(-1);
        ready = 1;
        memset(notif, 0, sizeof(struct seccomp_notif));
        setitimer(ITIMER_REAL, &each_ms, NULL);
        result = nsfs_result(ioctl(fd, SECCOMP_IOCTL_NOTIF_RECV, notif));
        setitimer(ITIMER_REAL, &never, NULL);
        return result;
    }

    static int nsfs_notif_valid(int fd, unsigned long long id)
    { return nsfs_result(ioctl(fd, SECCOMP_IOCTL_NOTIF_ID_VALID, &id)); }

    static int nsfs_notif_send(int fd, unsigned long long id, long long value, int error)
    {
        struct seccomp_notif_resp response = { .id = id, .val = value, .error = error };
        return nsfs_result(ioctl(fd, SECCOMP_IOCTL_NOTIF_SEND, &response));
    }

    static int nsfs_effective(int pid, unsigned int *capabilities)
    {
        struct __user_cap_header_struct header = { _LINUX_CAPABILITY_VERSION_3, pid };
        struct __user_cap_data_struct data[2];
        int result = nsfs_result(syscall(SYS_capget, &header, data));
        capabilities[0] = data[0].effective;
        capabilities[1] = data[1].effective;
        return result;
    }

    /* The types in the order of nsfs/namespaces.py.  The links are read, not followed: to follow
       one makes an inode of the kernel's nsfs. */
    static int nsfs_namespaces(int pid, unsigned int *numbers)
    {
        static const char *const types[8] =
            { "user", "cgroup", "ipc", "mnt", "net", "pid", "time", "uts" };
        char text[64];
        const char *number;
        int fd, i, result = 0;
        ssize_t length;

        snprintf(text, sizeof text, "/proc/%d/ns", pid);
        fd = nsfs_result(open(text, O_PATH | O_DIRECTORY | O_CLOEXEC));
        if (fd < 0)
            return fd;
        for (i = 0; i < 8 && !result; i++) {
            length = readlinkat(fd, types[i], text, sizeof text - 1);
            if (length < 0) {
                result = -errno;
                break;
            }
            text[length] = 0;
            number = strchr(text, '[');
            if (!number || sscanf(number, "[%u]", &numbers[i]) != 1)
                result = -EINVAL;
        }
        close(fd);
        return result;
    }
    """,
    extra_compile_args=["-Wall", "-Wextra", "-Wno-unused-parameter"],
)

if __name__ == "__main__":
    ffi.compile(verbose=True)
