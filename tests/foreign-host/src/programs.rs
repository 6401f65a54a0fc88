//! The same for programs: devices and models in a host of another's, with one table for WASI's
//! resources and ours.

use tightfit_wasm::component_from_module;
use tightfit_wasm::wit::program::add_program_to_linker;
use tightfit_wasm::wit::program::{ProgramCtx, ProgramCtxView, ProgramView, Run};
use tightfit_wasm::wit::{TightfitCtx, TightfitView};
use wasmtime::component::{Component, Linker, ResourceTable};
use wasmtime::{Config, Engine, Result, Store};
use wasmtime_wasi::{WasiCtx, WasiCtxView, WasiView};

/// A program's store data in this host.
struct Data {
    wasi: WasiCtx,
    table: ResourceTable,
    tightfit: TightfitCtx,
    program: ProgramCtx,
}

impl WasiView for Data {
    fn ctx(&mut self) -> WasiCtxView<'_> {
        WasiCtxView {
            ctx: &mut self.wasi,
            table: &mut self.table,
        }
    }
}

impl TightfitView for Data {
    fn tightfit(&mut self) -> &mut TightfitCtx {
        &mut self.tightfit
    }
}

impl ProgramView for Data {
    fn tightfit_program(&mut self) -> ProgramCtxView<'_> {
        ProgramCtxView {
            context: &mut self.program,
            table: &mut self.table,
        }
    }
}

/// An engine with a program and a linker that has WASI and Tightfit's interfaces.
pub struct ProgramHost {
    engine: Engine,
    component: Component,
    linker: Linker<Data>,
}

impl ProgramHost {
    /// Compiles a program, a component or a core module.
    ///
    /// # Errors
    /// When the bytes are neither.
    pub fn new(bytes: &[u8]) -> Result<ProgramHost> {
        let mut config = Config::new();
        config.consume_fuel(true);
        let engine = Engine::new(&config)?;
        let mut linker = Linker::new(&engine);
        wasmtime_wasi::p2::add_to_linker_async(&mut linker)?;
        add_program_to_linker(&mut linker)?;
        Ok(ProgramHost {
            component: Component::from_binary(&engine, &component_from_module(bytes)?)?,
            engine,
            linker,
        })
    }

    /// Runs the program with this much of the machine, in a store that yields to the executor every so
    /// often. Whatever it leaves behind goes with its store.
    ///
    /// # Errors
    /// When it cannot be instantiated or is none, or when it traps.
    pub async fn run(
        &self,
        program: ProgramCtx,
        arguments: &[String],
    ) -> Result<Result<String, String>> {
        let data = Data {
            wasi: WasiCtx::builder().build(),
            table: ResourceTable::new(),
            tightfit: TightfitCtx::new(),
            program,
        };
        let mut store = Store::new(&self.engine, data);
        store.set_fuel(10_000_000_000)?;
        store.fuel_async_yield_interval(Some(10_000))?;
        let linker = &self.linker;
        let instance = linker
            .instantiate_async(&mut store, &self.component)
            .await?;
        let run = Run::new(&mut store, &instance)?;
        run.run_async(&mut store, arguments).await
    }
}
