//! Work on several threads, which are kept for the next work: starting one takes longer than many a
//! product, and where other programs run it lands where it has to wait.

use std::{
    any::Any,
    hint, mem,
    num::NonZeroUsize,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    process,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU8, AtomicUsize, Ordering},
        mpsc::{self, Sender},
    },
    thread::{self, Thread},
};

/// Applies a function to each item, on all threads: each takes the next one when it is done with one. The
/// caller's is one of them, and waits for none that has not begun when all items are taken.
pub(crate) fn each<T: Sync, R: Send>(
    threads: NonZeroUsize,
    items: &[T],
    function: impl Fn(&T) -> R + Sync,
) -> Vec<R> {
    let next = AtomicUsize::new(0);
    let results = Mutex::new(Vec::with_capacity(items.len()));
    on_threads(threads.get().min(items.len()), &|| {
        let mut own = vec![];
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            match items.get(i) {
                Some(item) => own.push((i, function(item))),
                None => break,
            }
        }
        lock(&results).extend(own);
    });
    let mut results = results.into_inner().unwrap_or_else(PoisonError::into_inner);
    results.sort_unstable_by_key(|(i, _)| *i);
    results.into_iter().map(|(_, result)| result).collect()
}

const WAITS: u8 = 0;
const RUNS: u8 = 1;
const ENDED: u8 = 2;

/// How often the state of another thread's work is looked at before the caller sleeps.
const LOOKS: usize = 2000;

/// Work of one call for one thread.
struct Task {
    /// Valid until the state is [`ENDED`].
    work: *const (dyn Fn() + Sync),
    state: AtomicU8,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    caller: Thread,
}

// SAFETY: `work` may be called by any thread, and the rest is of such types.
unsafe impl Send for Task {}
// SAFETY: as above.
unsafe impl Sync for Task {}

impl Task {
    /// Does the work, if its caller has not gone on without.
    fn run(&self) {
        if !self.advance(WAITS, RUNS) {
            return;
        }
        // SAFETY: the caller waits until the state is `ENDED`, for it is `RUNS`.
        let work = unsafe { &*self.work };
        if let Err(panic) = catch_unwind(AssertUnwindSafe(work)) {
            *lock(&self.panic) = Some(panic);
        }
        self.state.store(ENDED, Ordering::Release);
        self.caller.unpark();
    }

    fn advance(&self, from: u8, to: u8) -> bool {
        self.state
            .compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire)
            .is_ok()
    }

    /// Returns when no thread does the work, or ever will.
    fn end(&self) {
        if self.advance(WAITS, ENDED) {
            return;
        }
        let mut looks = 0;
        while self.state.load(Ordering::Acquire) != ENDED {
            if looks < LOOKS {
                looks += 1;
                hint::spin_loop();
            } else {
                thread::park();
            }
        }
    }
}

/// A thread that does tasks one after the other.
type Worker = Sender<Arc<Task>>;

/// Threads without work, and the process that they are in: after a fork the child has none of them.
struct Idle {
    workers: Vec<Worker>,
    process: u32,
}

static IDLE: Mutex<Idle> = Mutex::new(Idle {
    workers: vec![],
    process: 0,
});

fn idle() -> MutexGuard<'static, Idle> {
    let mut idle = lock(&IDLE);
    let process = process::id();
    if idle.process != process {
        idle.process = process;
        // They are the parent's, and their state is that of some moment.
        mem::forget(mem::take(&mut idle.workers));
    }
    idle
}

/// Has a task done by a thread that was idle, or by a new one; returns it, or nothing if there can be no more.
fn start(task: &Arc<Task>) -> Option<Worker> {
    let worker = idle().workers.pop();
    let worker = worker.or_else(|| {
        let (sender, tasks) = mpsc::channel::<Arc<Task>>();
        let run = move || tasks.iter().for_each(|task| task.run());
        let name = "tightfit-kernels".to_owned();
        thread::Builder::new().name(name).spawn(run).ok()?;
        Some(sender)
    })?;
    worker.send(Arc::clone(task)).ok()?;
    Some(worker)
}

/// Does work on some threads at once, of which the caller's is one.
fn on_threads(threads: usize, work: &(dyn Fn() + Sync)) {
    /// Waits even if the caller's own work panics.
    struct Started(Vec<(Arc<Task>, Worker)>);

    impl Drop for Started {
        fn drop(&mut self) {
            for (task, _) in &self.0 {
                task.end();
            }
            let workers = self.0.iter().map(|(_, worker)| worker.clone());
            idle().workers.extend(workers);
        }
    }

    // SAFETY: only the lifetime changes. It is not called any more when this function has ended: each
    // task that is started is waited for, and none runs later.
    let forever = unsafe {
        mem::transmute::<*const (dyn Fn() + Sync + '_), *const (dyn Fn() + Sync + 'static)>(work)
    };
    let mut started = Started(vec![]);
    for _ in 1..threads {
        let task = Arc::new(Task {
            work: forever,
            state: AtomicU8::new(WAITS),
            panic: Mutex::new(None),
            caller: thread::current(),
        });
        let Some(worker) = start(&task) else { break };
        started.0.push((task, worker));
    }
    work();
    let tasks: Vec<_> = started.0.iter().map(|(task, _)| Arc::clone(task)).collect();
    drop(started);
    for task in tasks {
        if let Some(panic) = lock(&task.panic).take() {
            resume_unwind(panic);
        }
    }
}

/// A panic while it was held has left nothing half done.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::{collections::HashSet, sync::Barrier};

    use super::*;

    fn threads(n: usize) -> NonZeroUsize {
        NonZeroUsize::new(n).expect("not 0")
    }

    #[test]
    fn results_in_order_and_calls_in_calls() {
        let items: Vec<usize> = (0..50).collect();
        for count in [1, 2, 7, 100] {
            let results = each(threads(count), &items, |i| {
                let inner: Vec<usize> = (0..*i).collect();
                each(threads(3), &inner, |i| i * i).iter().sum::<usize>()
            });
            let sums = items.iter().map(|i| (0..*i).map(|i| i * i).sum());
            assert_eq!(results, sums.collect::<Vec<usize>>());
        }
        assert_eq!(each(threads(3), &[] as &[u8], |i| *i), []);
    }

    #[test]
    fn as_many_threads_as_there_are_items_at_once() {
        let barrier = Barrier::new(4);
        let mut seen = HashSet::new();
        for _ in 0..50 {
            let ids = each(threads(4), &[(); 4], |()| {
                barrier.wait();
                thread::current().id()
            });
            assert_eq!(ids.iter().collect::<HashSet<_>>().len(), 4);
            seen.extend(ids);
        }
        // Other tests take some of them meanwhile, but not one of each call.
        assert!(seen.len() < 100, "{} threads for 50 calls", seen.len());
    }

    #[test]
    fn panics_reach_the_caller_when_all_have_ended() {
        for panicking in 0..4 {
            let ended = AtomicUsize::new(0);
            let barrier = Barrier::new(4);
            let result = catch_unwind(AssertUnwindSafe(|| {
                each(threads(4), &[0, 1, 2, 3], |i| {
                    barrier.wait();
                    if *i == panicking {
                        panic!("{i}");
                    }
                    thread::yield_now();
                    ended.fetch_add(1, Ordering::Relaxed);
                })
            }));
            let panic = result.expect_err("a panic");
            assert_eq!(panic.downcast_ref::<String>(), Some(&panicking.to_string()));
            assert_eq!(ended.load(Ordering::Relaxed), 3);
        }
        assert_eq!(each(threads(4), &[1, 2], |i| i + 1), [2, 3]);
    }
}
