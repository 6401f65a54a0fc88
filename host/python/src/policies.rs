//! Policies: built-in ones are compiled once in a process.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tightfit_wasm::policy::{BUILTIN_POLICIES, WasmPolicy};
use tightfit_wasm::sandbox::{Cache, Compiler, CompilerProgram, Limits, SandboxOptions};

use tightfit::cancel::CancelToken;
use tightfit::checkpoint::TensorInfo;
use tightfit::policy::{Answer, Description, Policy, PolicyError, Request};

use crate::failure::Failure;

/// Asks a policy about parts of tensors by the tensors' names, where it has one part of each: rules for
/// formats and device maps go by names.
pub(crate) struct ByWholeNames<'p>(pub(crate) &'p dyn Policy);

impl Policy for ByWholeNames<'_> {
    fn describe(&self) -> Result<Description, PolicyError> {
        self.0.describe()
    }

    fn label(&self) -> Option<&str> {
        self.0.label()
    }

    fn plan(&self, request: &Request<'_>) -> Result<Answer, PolicyError> {
        let mut times: HashMap<&str, usize> = HashMap::new();
        for tensor in request.tensors {
            *times.entry(whole_name(tensor)).or_default() += 1;
        }
        if request.tensors.iter().all(|tensor| tensor.piece.is_none()) {
            return self.0.plan(request);
        }
        let renamed = |tensor: &TensorInfo| {
            let mut renamed = tensor.clone();
            let name = whole_name(tensor);
            if times.get(name) == Some(&1) {
                name.clone_into(&mut renamed.name);
            }
            renamed
        };
        let tensors: Vec<TensorInfo> = request.tensors.iter().map(renamed).collect();
        self.0.plan(&Request {
            tensors: &tensors,
            ..*request
        })
    }
}

fn whole_name(tensor: &TensorInfo) -> &str {
    let piece = tensor.piece.as_deref();
    piece.map_or(&tensor.name, |piece| &piece.of)
}

/// Opens a policy by its built-in name or its file, with these limits in place of the usual ones.
pub(crate) fn open(
    name: &str,
    limits: &[(String, String)],
    compiler: Option<CompilerProgram>,
    cancel: &CancelToken,
) -> Result<Arc<WasmPolicy>, Failure> {
    static KEPT: Mutex<Option<HashMap<String, Arc<WasmPolicy>>>> = Mutex::new(None);
    let is_kept = limits.is_empty() && BUILTIN_POLICIES.contains(&name);
    let kept = || KEPT.lock().unwrap_or_else(PoisonError::into_inner);
    if is_kept && let Some(policy) = kept().get_or_insert_default().get(name) {
        return Ok(Arc::clone(policy));
    }
    let mut allowed = Limits::default();
    for (name, value) in limits {
        allowed.set(name, value).map_err(Failure::usage)?;
    }
    let compiler = match compiler {
        Some(program) => Compiler::Child(program),
        None => {
            if !BUILTIN_POLICIES.contains(&name) {
                tracing::warn!(
                    "this interpreter does not say which program it is: '{name}' is compiled in this \
                     process, which nothing limits"
                );
            }
            Compiler::InProcess
        }
    };
    // Without a cache everything works, and policies are compiled anew in each process.
    let cache = Cache::default_path().and_then(|path| {
        let opened = Cache::open(&path, Cache::MOST_BYTES);
        opened.inspect_err(|error| tracing::debug!("{error}")).ok()
    });
    let options = SandboxOptions::default()
        .with_limits(allowed)
        .with_compiler(compiler)
        .with_cache(cache.map(Arc::new))
        .with_cancel(match is_kept {
            // It outlives this call.
            true => CancelToken::new(),
            false => cancel.clone(),
        });
    let policy = Arc::new(WasmPolicy::open(name, options)?);
    if is_kept {
        kept()
            .get_or_insert_default()
            .insert(name.to_owned(), Arc::clone(&policy));
    }
    Ok(policy)
}
