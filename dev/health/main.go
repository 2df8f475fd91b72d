// Command health tells how GitOps tools see objects, by the very libraries that they use.
//
//	health kstatus               by kstatus alone, as Flux and kubectl apply --wait do
//	health flux CHECKS.yaml      by a Kustomization's healthCheckExprs, as Flux's kustomize-controller does
//	health argocd HEALTH.lua     by a health check of Argo CD
//
// It reads a JSON list of objects on standard input, and writes a JSON list of {"status", "message"} in their order.
package main

import (
	"context"
	"fmt"
	"io"
	"log"
	"os"

	"github.com/fluxcd/cli-utils/pkg/kstatus/status"
	"github.com/fluxcd/pkg/apis/kustomize"
	"github.com/fluxcd/pkg/runtime/cel"
	lua "github.com/yuin/gopher-lua"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/util/json"
	"sigs.k8s.io/yaml"
)

// Health is what a tool says of an object.
type Health struct {
	Status  string `json:"status"`
	Message string `json:"message"`
}

type check func(*unstructured.Unstructured) (Health, error)

func main() {
	log.SetFlags(0)
	if len(os.Args) < 2 {
		log.Fatal("usage: health kstatus | flux CHECKS.yaml | argocd HEALTH.lua")
	}
	judge, err := checkFor(os.Args[1], os.Args[2:])
	if err != nil {
		log.Fatal(err)
	}
	input, err := io.ReadAll(os.Stdin)
	if err != nil {
		log.Fatal(err)
	}
	var objects []any
	if err := json.Unmarshal(input, &objects); err != nil { // Kubernetes' own: whole numbers stay whole
		log.Fatal(err)
	}
	healths := make([]Health, 0, len(objects))
	for _, object := range objects {
		health, err := judge(&unstructured.Unstructured{Object: object.(map[string]any)})
		if err != nil {
			log.Fatal(err)
		}
		healths = append(healths, health)
	}
	output, err := json.Marshal(healths)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(string(output))
}

func checkFor(tool string, files []string) (check, error) {
	if tool == "kstatus" {
		return byKstatus, nil
	}
	if len(files) != 1 {
		return nil, fmt.Errorf("health %s needs a file", tool)
	}
	text, err := os.ReadFile(files[0])
	if err != nil {
		return nil, err
	}
	switch tool {
	case "flux":
		return byFlux(text)
	case "argocd":
		return byArgoCD(string(text)), nil
	}
	return nil, fmt.Errorf("no tool %s", tool)
}

func byKstatus(object *unstructured.Unstructured) (Health, error) {
	result, err := status.Compute(object)
	if err != nil {
		return Health{}, err
	}
	return Health{Status: result.Status.String(), Message: result.Message}, nil
}

// byFlux reads the list healthCheckExprs. Flux asks it in place of kstatus for the kinds that it names.
func byFlux(text []byte) (check, error) {
	var spec struct {
		HealthCheckExprs []kustomize.CustomHealthCheck `json:"healthCheckExprs"`
	}
	if err := yaml.UnmarshalStrict(text, &spec); err != nil {
		return nil, err
	}
	if len(spec.HealthCheckExprs) != 1 {
		return nil, fmt.Errorf("%d checks", len(spec.HealthCheckExprs))
	}
	wanted := spec.HealthCheckExprs[0]
	evaluator, err := cel.NewStatusEvaluator(&wanted.HealthCheckExpressions)
	if err != nil {
		return nil, err
	}
	return func(object *unstructured.Unstructured) (Health, error) {
		if object.GetAPIVersion() != wanted.APIVersion || object.GetKind() != wanted.Kind {
			return Health{}, fmt.Errorf("the check is not for %s %s", object.GetAPIVersion(), object.GetKind())
		}
		result, err := evaluator.Evaluate(context.Background(), object)
		if err != nil {
			return Health{}, err
		}
		return Health{Status: result.Status.String(), Message: result.Message}, nil
	}, nil
}

// byArgoCD runs the script as Argo CD does without useOpenLibs: with the libraries base and table alone.
func byArgoCD(script string) check {
	return func(object *unstructured.Unstructured) (Health, error) {
		state := lua.NewState(lua.Options{SkipOpenLibs: true})
		defer state.Close()
		for _, library := range []struct {
			name string
			open lua.LGFunction
		}{{lua.LoadLibName, lua.OpenPackage}, {lua.BaseLibName, lua.OpenBase}, {lua.TabLibName, lua.OpenTable}} {
			state.Push(state.NewFunction(library.open))
			state.Push(lua.LString(library.name))
			state.Call(1, 0)
		}
		state.SetGlobal("obj", toLua(state, object.Object))
		if err := state.DoString(script); err != nil {
			return Health{}, err
		}
		result, ok := state.Get(-1).(*lua.LTable)
		if !ok {
			return Health{}, fmt.Errorf("the script returns no table")
		}
		return Health{Status: text(result, "status"), Message: text(result, "message")}, nil
	}
}

func text(table *lua.LTable, field string) string {
	if value, ok := table.RawGetString(field).(lua.LString); ok {
		return string(value)
	}
	return ""
}

func toLua(state *lua.LState, value any) lua.LValue {
	switch value := value.(type) {
	case bool:
		return lua.LBool(value)
	case int64:
		return lua.LNumber(value)
	case float64:
		return lua.LNumber(value)
	case string:
		return lua.LString(value)
	case []any:
		table := state.CreateTable(len(value), 0)
		for _, item := range value {
			table.Append(toLua(state, item))
		}
		return table
	case map[string]any:
		table := state.CreateTable(0, len(value))
		for key, item := range value {
			table.RawSetString(key, toLua(state, item))
		}
		return table
	}
	return lua.LNil
}
